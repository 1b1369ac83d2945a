"""What an engine may use. Importing this needs no torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import tyro

from fourfold.errors import ConfigError
from fourfold.models.precision import PageFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Budgets of one engine."""

    max_running: int = 64
    """Samples computed together at most; the rest wait in order of arrival."""
    step_tokens: int = 512
    """Tokens of one step at most: one for each decoding sample, the rest for chunks of prompts."""
    kv_memory_gib: float | None = None
    """Memory for KV pages in GiB. Default: 2 on a CPU, 90 % of what is free on a GPU."""
    kv_pages: Annotated[PageFormat, tyro.conf.EnumChoicesFromValues] = PageFormat.AUTO
    """What keys and values are kept in. auto: int8 on a GPU whose model has quantised weights, else
    float; fp8 needs a GPU that multiplies e4m3."""
    max_context: int | None = None
    """Prompt plus answer at most, in tokens. Default: what the model and the KV pages allow."""
    prefix_cache: bool = True
    """Keep finished pages and reuse them for prompts that begin alike."""
    decode_threads: int | None = None
    """CPU threads of a step without prompts; prompts use all cores. Default: all cores, but when
    serving one less, so that HTTP does not stop the others at every barrier."""

    def __post_init__(self) -> None:
        if self.max_running < 1:
            raise ConfigError(f"--max-running {self.max_running} must be at least 1")
        if self.step_tokens <= self.max_running:
            raise ConfigError(
                f"--step-tokens {self.step_tokens} must exceed --max-running {self.max_running}, "
                "or prompts would starve while others decode"
            )
        if self.kv_memory_gib is not None and not 0 < self.kv_memory_gib < math.inf:
            raise ConfigError(f"--kv-memory-gib {self.kv_memory_gib} must be positive and finite")
        if self.decode_threads is not None and self.decode_threads < 1:
            raise ConfigError(f"--decode-threads {self.decode_threads} must be at least 1")
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"--max-context {self.max_context} must be at least 2")
