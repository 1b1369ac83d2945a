"""The options of `fourfold bench train`. Imports nothing heavy: the CLI is built from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fourfold.bench.command_line import check_distinct
from fourfold.errors import ConfigError

Peer = Literal["plain", "compiled", "torchtitan"]
Form = Literal["sparse", "dense"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBenchConfig:
    """Measures whole training steps of a configuration's sparse and dense forms, beside others that
    take the same steps: rows of one document of random tokens, AdamW, clipping.

    Each is built, warmed up and timed on its own, one after the other. Speeds are medians over the
    rounds. Only models with a softmax router have peers.
    """

    config: Annotated[Path, tyro.conf.Positional]
    """What `fourfold train` would read; its data is not."""
    set: tuple[str, ...] = ()
    """section.field=value, instead of what the file says."""
    forms: tuple[Form, ...] = ("sparse", "dense")
    """Which forms of the model."""
    peers: tuple[Peer, ...] = ()
    """plain: modules of torch, sorted rows and grouped products. compiled: the same under
    torch.compile. torchtitan: its Qwen3, its layers compiled; must be installed. A peer that does
    not fit the device takes smaller micro-batches; one that fails, or fits with none, is left out,
    and why is said."""
    vocabulary: int = 32768
    """Tokens of the vocabulary, where the configuration has no model.vocabulary."""
    warmup: int = 3
    """Steps before the first round."""
    steps: int = 4
    """Steps of a round."""
    rounds: int = 3
    """Turns of each."""
    name: str = "train"
    """The record's name."""
    out: Path | None = None
    """Where the JSON record goes."""

    def __post_init__(self) -> None:
        check_distinct("--forms", self.forms)
        check_distinct("--peers", self.peers)
        if min(self.steps, self.rounds, self.vocabulary) < 1 or not self.forms or self.warmup < 0:
            raise ConfigError("--steps, --rounds, --vocabulary and --forms must be at least one")
