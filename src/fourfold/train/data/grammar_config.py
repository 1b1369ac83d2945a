"""The size of a grammar. Imports nothing heavy."""

from __future__ import annotations

import dataclasses

from fourfold.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrammarConfig:
    """The size of a grammar. ConfigError for one that cannot be."""

    levels: int = 4
    """Of rules above the words: a sentence has 2 ** levels words, and a mark behind them."""
    symbols: int = 32
    """Of every level."""
    rules: int = 8
    """Of a symbol."""
    words: int = 64
    """Of a lowest symbol."""
    topics: int = 8
    sentences: float = 8.0
    """Of a document, on average."""
    exponent: float = 1.0
    """Of Zipf's law, for rules and words."""
    seed: int = 0
    """Which grammar of this size."""

    def __post_init__(self) -> None:
        sizes = (self.levels, self.symbols, self.rules, self.words, self.topics)
        if min(sizes) < 1 or self.sentences < 1 or self.exponent < 0 or self.seed < 0:
            raise ConfigError("the sizes of a grammar are at least 1, its exponent and seed 0")
        if self.rules > self.symbols:
            raise ConfigError(
                f"{self.symbols} symbols have {self.symbols**2} pairs, too few for {self.rules} "
                f"rules each; take at most {self.symbols} rules"
            )

    @property
    def vocabulary(self) -> int:
        """Ids there are: 0 is the mark behind a sentence, 1 that behind a document."""
        return 2 + self.symbols * self.words

    @property
    def sentence_tokens(self) -> int:
        return int(2**self.levels) + 1
