"""The size of a grammar. Imports nothing heavy."""

from __future__ import annotations

import dataclasses

from fourfold.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrammarConfig:
    """The size of a grammar. ConfigError for one that cannot be."""

    levels: int = 4
    """Levels of rules above the words: a sentence has 2 ** levels words, and a mark behind them."""
    symbols: int = 32
    """Symbols of every level."""
    rules: int = 8
    """Rules of a symbol: pairs of symbols of the level below that it may become."""
    words: int = 64
    """Words that a symbol of the lowest level may become."""
    topics: int = 8
    """A document has one of so many topics, which says how likely each kind of sentence is."""
    sentences: float = 8.0
    """Sentences of a document, on average."""
    exponent: float = 1.0
    """How unequal the odds of rules and words are: the exponent of Zipf's law, 0 for equal odds."""
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
