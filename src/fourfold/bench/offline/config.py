"""The options of `fourfold bench offline`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fourfold.errors import ConfigError
from fourfold.models.precision import PageFormat, Precision

Peer = Literal["transformers", "llama.cpp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineBenchConfig:
    """Measures prefill and decode of the engine alone, in turns with other engines.

    Every figure is the median over the rounds. `transformers` computes the same weights dense and
    dequantised in float32; `llama.cpp` (llama-cpp-python) computes the GGUF file as it is.
    """

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A directory, a .gguf file or a hub id; without it, the embedded default. Peers need GGUF."""
    precision: Annotated[Precision, tyro.conf.EnumChoicesFromValues] = Precision.AUTO
    """What we compute in."""
    kv_pages: Annotated[PageFormat, tyro.conf.EnumChoicesFromValues] = PageFormat.AUTO
    """What we keep keys and values in."""
    load: Literal["checkpoint", "dummy"] = "checkpoint"
    """dummy: random weights; only the configuration is read. Peers then have nothing to load."""
    routing: Literal["router", "uniform"] = "router"
    """uniform: spread tokens evenly over the experts; only with --load dummy."""
    peers: tuple[Peer, ...] = ()
    """Engines to measure beside ours; they must be installed."""
    prompt_tokens: int = 512
    """Prompt of the prefill and the batch-1 decode figures."""
    batch: int = 16
    """Requests of the concurrent decode figure."""
    batch_prompt_tokens: int = 128
    """Their prompts."""
    output_tokens: int = 64
    """Tokens decoded for each decode figure."""
    rounds: int = 3
    """Turns; each engine starts anew in each."""
    name: str = "offline"
    """The record's name."""
    out: Path | None = None
    """Where the JSON record goes."""

    def __post_init__(self) -> None:
        if self.peers and self.load == "dummy":
            raise ConfigError("--load dummy gives peers nothing to load; leave out --peers")
        numbers = ("prompt_tokens", "batch", "batch_prompt_tokens", "output_tokens", "rounds")
        for name in numbers:
            if getattr(self, name) < (2 if name == "output_tokens" else 1):
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small")
