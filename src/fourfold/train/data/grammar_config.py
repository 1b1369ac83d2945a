"""The size of a grammar. Imports nothing heavy."""

from __future__ import annotations

import dataclasses

from fourfold.errors import ConfigError

# What is written and drawn from is held in memory: a sentence, the pairs of symbols, a document.
_BOUNDS = {
    "levels": (1, 16),
    "symbols": (1, 1 << 12),
    "rules": (1, 1 << 12),
    "words": (1, 1 << 12),
    "topics": (1, 1 << 12),
    "sentences": (1, 1 << 16),
    "exponent": (0, 16),
}


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
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"--{name} {value} must be between {least} and {most}")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} must be at least 0")
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
