"""The options of `fourfold bench quality`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fourfold.errors import ConfigError
from fourfold.models.precision import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityBenchConfig:
    """Compares a precision with float32: perplexity, and agreement on the likeliest next token.

    Both read the same windows of the same text, every token predicted from those before it.
    """

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A directory, a .gguf file or a hub id; without it, the embedded default."""
    precision: Annotated[Precision, tyro.conf.EnumChoicesFromValues] = Precision.AUTO
    """What is compared with float32."""
    text: Path | None = None
    """A text file. Default: the language reference that Python carries (pydoc_data.topics)."""
    windows: int = 32
    """How many pieces of the text are read, evenly spread over it."""
    window_tokens: int = 512
    """Their length."""
    out: Path | None = None
    """Where the JSON record goes."""

    def __post_init__(self) -> None:
        if self.windows < 1 or self.window_tokens < 2:
            raise ConfigError("--windows must be at least 1 and --window-tokens at least 2")
