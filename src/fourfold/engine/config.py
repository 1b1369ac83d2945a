"""What an engine may use. Importing this needs no torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import tyro

from fourfold.errors import ConfigError
from fourfold.models.precision import PageFormat

# Beyond all reason: memory is taken for each sample and token, and each thread is started.
_MOST = {"max_running": 1 << 16, "step_tokens": 1 << 22, "decode_threads": 1 << 10}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Budgets of one engine."""

    max_running: int | None = None
    """Samples computed together at most; the rest wait in order of arrival. Default: 64 on a CPU,
    256 on a GPU."""
    step_tokens: int | None = None
    """Tokens of one step at most: one for each decoding sample, the rest for chunks of prompts.
    Default: 512 on a CPU, 8192 on a GPU."""
    mixed_tokens: int | None = None
    """Tokens of prompts at most in a step that also decodes, and two or four times as many
    while four steps of so many wait: fewer keep answers flowing evenly while prompts arrive, more
    let prompts begin sooner. Over 8-bit pages at least a page, 64. Default: no limit on a CPU, 512
    on a GPU."""
    kv_memory_gib: float | None = None
    """Memory for KV pages in GiB. Default: 2 on a CPU, or less where little is available; on a GPU
    what weights and a step leave."""
    kv_pages: Annotated[PageFormat, tyro.conf.EnumChoicesFromValues] = PageFormat.AUTO
    """What keys and values are kept in. auto: int8 on a GPU, if it is an Ampere or newer and reads
    heads like the model's, but not for bfloat16 keys with biases; else float. Of GPUs, fp8 needs
    one that multiplies e4m3 (Ada, Hopper and later)."""
    max_context: int | None = None
    """Prompt plus answer at most, in tokens. Default: what the model and the KV pages allow."""
    prefix_cache: bool = True
    """Keep finished pages and reuse them for prompts that begin alike. Samples of one request share
    those of their prompt in any case."""
    overlap: bool | None = None
    """Schedule and launch a step while the one before it still runs. The answers are the same.
    Default: on a GPU."""
    cuda_graphs: bool = True
    """Replay a GPU's steps over 8-bit pages from recordings, instead of launching their kernels one
    by one. The answers are the same."""
    decode_threads: int | None = None
    """CPU threads of a step without prompts; prompts use all cores. Default: all cores, but when
    serving one less, which is left to HTTP: all threads of a step wait for the slowest."""

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                option = f"--{name}".replace("_", "-")
                raise ConfigError(f"{option} {value} must be at most {most}")
        if self.running < 1:
            raise ConfigError(f"--max-running {self.running} must be at least 1")
        if self.tokens <= self.running:
            raise ConfigError(
                f"--step-tokens {self.tokens} must exceed --max-running {self.running}, "
                "or prompts would starve while others decode"
            )
        if self.mixed_tokens is not None and self.mixed_tokens < 1:
            raise ConfigError(f"--mixed-tokens {self.mixed_tokens} must be at least 1")
        if self.kv_memory_gib is not None and not 0 < self.kv_memory_gib < math.inf:
            raise ConfigError(f"--kv-memory-gib {self.kv_memory_gib} must be positive and finite")
        if self.decode_threads is not None and self.decode_threads < 1:
            raise ConfigError(f"--decode-threads {self.decode_threads} must be at least 1")
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"--max-context {self.max_context} must be at least 2")

    @property
    def running(self) -> int:
        """`max_running`, or what a CPU has by default."""
        return 64 if self.max_running is None else self.max_running

    @property
    def tokens(self) -> int:
        """`step_tokens`, or what a CPU has by default."""
        return max(512, 2 * self.running) if self.step_tokens is None else self.step_tokens

    def on(self, device_type: str) -> EngineConfig:
        """The same with the defaults of a kind of device filled in."""
        gpu = device_type != "cpu"
        running = self.max_running or (256 if gpu else 64)
        config = dataclasses.replace(self, max_running=running)
        return dataclasses.replace(
            config,
            step_tokens=self.step_tokens or (max(8192, 2 * running) if gpu else config.tokens),
            mixed_tokens=self.mixed_tokens or (512 if gpu else None),
            overlap=gpu if self.overlap is None else self.overlap,
        )
