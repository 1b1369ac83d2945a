"""The options of `fourfold bench layers`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fourfold.errors import ConfigError
from fourfold.models.precision import PageFormat, Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersBenchConfig:
    """Compares a quantised model with bfloat16 layer by layer, both made of the same weights.

    Random tokens run through three models, one layer of each held at a time: *exact* in bfloat16,
    *served* as when serving (codes, kernels, 8-bit pages; prompts are prefilled and one more token
    is decoded), and *plain*: what the served codes stand for, computed in float32 with activations
    rounded as the precision says. What served and plain differ by is the kernels' error, and fails
    the run where it is more than they are allowed; what plain and exact differ by is the codes',
    and has a bound of its own. All go to the experts that exact chose, so that a near tie in a
    router does not look like an error.
    """

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A directory, a .gguf file or a hub id; without it, the embedded default."""
    load: Literal["checkpoint", "dummy"] = "checkpoint"
    """dummy: random weights; only the configuration is read."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the first GPU there is."""
    precision: Annotated[Precision, tyro.conf.EnumChoicesFromValues] = Precision.W4A8
    """Precision of the served model; one with quantised weights."""
    kv_pages: Annotated[PageFormat, tyro.conf.EnumChoicesFromValues] = PageFormat.AUTO
    """What the served model keeps keys and values in."""
    prompts: int = 4
    """How many prompts are computed together."""
    prompt_tokens: int = 1000
    """Tokens of a prompt."""
    name: str = "layers"
    """The record's name."""
    out: Path | None = None
    """Where the JSON record goes."""

    def __post_init__(self) -> None:
        if not self.precision.quantised:
            raise ConfigError(
                f"--precision {self.precision} has no codes to compare; use w8a8, w4a8 or w4a8-fp8"
            )
        if self.prompts < 1 or self.prompt_tokens < 2:
            raise ConfigError("--prompts must be at least 1 and --prompt-tokens at least 2")
