"""The options of `fourfold bench quality`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fourfold.errors import ConfigError
from fourfold.models.precision import PageFormat, Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityBenchConfig:
    """Compares a precision with float32: perplexity, agreement on the likeliest next token, and
    whether a fact is found again in a long context.

    Both read the same windows of the same text, every token predicted from those before it.
    """

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A directory, a .gguf file or a hub id; without it, the embedded default."""
    reference: str | None = None
    """The model that MODEL was quantised from, read in float32; without it, MODEL itself."""
    precision: Annotated[Precision, tyro.conf.EnumChoicesFromValues] = Precision.AUTO
    """What is compared with float32."""
    kv_pages: Annotated[PageFormat, tyro.conf.EnumChoicesFromValues] = PageFormat.AUTO
    """What its keys and values are kept in; the reference reads float pages."""
    text: Path | None = None
    """A text file. Default: the language reference that Python carries (pydoc_data.topics)."""
    windows: int = 32
    """How many pieces of the text are read, evenly spread over it."""
    window_tokens: int = 512
    """Tokens of such a piece."""
    needles: int = 0
    """Facts to be found again, each hidden at another depth of a piece of the text."""
    needle_tokens: int = 2048
    """Tokens of a piece that hides a fact."""
    name: str = "quality"
    """The record's name."""
    out: Path | None = None
    """Where the JSON record goes."""

    def __post_init__(self) -> None:
        if self.windows < 1 or self.window_tokens < 2:
            raise ConfigError("--windows must be at least 1 and --window-tokens at least 2")
        if self.needles < 0 or self.needle_tokens < 128:
            raise ConfigError("--needles must not be negative, --needle-tokens at least 128")
