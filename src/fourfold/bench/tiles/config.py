"""The options of `fourfold bench tiles`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from fourfold.bench.command_line import check_distinct
from fourfold.errors import ConfigError

Product = Literal["projections-8", "projections-4", "experts-first", "experts-second"]
Recipe = Literal["int8-channel", "int8-g128", "int8-g64", "fp8-channel", "fp8-g128"]
_MOST_TOKENS = 65536


@dataclasses.dataclass(frozen=True, kw_only=True)
class TilesBenchConfig:
    """Times the products of Qwen3-30B-A3B with every tile that could suit, beside the chosen one.

    Says how far the choice is from the best on this GPU; the choice itself is a table in the
    source, for nothing is tuned when a server starts.
    """

    products: tuple[Product, ...] = (
        "projections-8",
        "projections-4",
        "experts-first",
        "experts-second",
    )
    """Of weights of 8 or 4 bits: the attention's projections; the experts' two products."""
    tokens: tuple[int, ...] = (1, 8, 32, 64, 128, 256, 512, 2048)
    """Tokens of a step."""
    recipe: Recipe = "int8-g64"
    """How 4-bit weights are kept; by default as `--precision w4a8` serves them."""
    out: Path | None = None
    """Where the JSON record goes."""

    def __post_init__(self) -> None:
        check_distinct("--products", self.products)
        check_distinct("--tokens", self.tokens)
        if not self.products or not self.tokens:
            raise ConfigError("there is nothing to time; give --products and --tokens one value")
        if wrong := [count for count in self.tokens if not 0 < count <= _MOST_TOKENS]:
            raise ConfigError(f"--tokens takes counts from 1 to {_MOST_TOKENS}, not {wrong[0]}")
