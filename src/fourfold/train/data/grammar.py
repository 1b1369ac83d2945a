"""An endless source that is built like text: a hierarchy of rules above words of Zipf frequencies.

A document has a topic, which says how likely each kind of sentence is. A sentence is a tree: its
root is replaced by two symbols of the level below, those by two each, and the lowest by words. No
two symbols of a level share a pair below them, and no two share a word, so a sentence has one tree
and its entropy is that of its choices, known exactly. Rules and words are drawn by Zipf's law: a
larger model has ever rarer rules left to learn.

Shapes: B rows, L tokens that are predicted in a row, K kinds of sentences, M symbols of a level,
R rules of a symbol, W words of a symbol, Z topics, N sentences.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from numpy.typing import NDArray

from fourfold.errors import ConfigError
from fourfold.train.data.batches import Batch

Floats = NDArray[np.float64]
Symbols = NDArray[np.int64]


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


class Grammar:
    """A drawn grammar, and what its sentences' entropy is."""

    def __init__(self, config: GrammarConfig) -> None:
        self.config = config
        draws = _generator(config.seed, 0)
        pairs = config.symbols**2
        self._pairs = [
            draws.permutation(pairs)[: config.symbols * config.rules].reshape(config.symbols, -1)
            for _ in range(config.levels)
        ]
        """For each level, the pairs (left * M + right) of its symbols' rules: int [M, R]."""
        self._word_MW: Symbols = 2 + draws.permutation(config.symbols * config.words).reshape(
            config.symbols, config.words
        )
        self._rule_R = _zipf(config.rules, config.exponent)
        self._word_W = _zipf(config.words, config.exponent)
        root_K = _zipf(config.symbols, config.exponent)
        self._root_ZK = np.stack([draws.permutation(root_K) for _ in range(config.topics)])

    def sentences(self, root_N: Symbols, draws: np.random.Generator) -> Symbols:
        """Trees below so many roots: ids [N, sentence_tokens], the mark behind each included."""
        symbols = root_N[:, None]
        for pairs_MR in self._pairs:
            pair = pairs_MR[symbols, _draw(self._rule_R, draws.random(symbols.shape))]
            halves = pair // self.config.symbols, pair % self.config.symbols
            symbols = np.stack(halves, -1).reshape(len(root_N), -1)
        words = self._word_MW[symbols, _draw(self._word_W, draws.random(symbols.shape))]
        return np.pad(words, ((0, 0), (0, 1)))

    def document(self, draws: np.random.Generator) -> Symbols:
        """The ids of a document."""
        topic = int(draws.integers(self.config.topics))
        count = int(draws.geometric(1.0 / self.config.sentences))
        root_N = _draw(self._root_ZK[topic], draws.random(count))
        ids = self.sentences(root_N, draws).reshape(-1)
        return np.append(ids, 1)

    @property
    def sentence_entropy(self) -> float:
        """Nats of a sentence, its document's topic known."""
        branches = 2**self.config.levels - 1
        leaves = 2**self.config.levels
        root = float(np.mean([_entropy(root_K) for root_K in self._root_ZK]))
        return root + float(branches * _entropy(self._rule_R) + leaves * _entropy(self._word_W))

    @property
    def entropy(self) -> tuple[float, float]:
        """Nats per token of whole documents, from below and from above: what lies between is what a
        document's topic adds, which its text tells only in part."""
        config = self.config
        goes_on = 1.0 - 1.0 / config.sentences
        # After each sentence it is drawn whether another follows.
        ending = _entropy(np.array([goes_on, 1.0 - goes_on]))
        nats = config.sentences * (self.sentence_entropy + ending)
        tokens = config.sentences * config.sentence_tokens + 1
        return nats / tokens, (nats + math.log(config.topics)) / tokens


class GrammarBatches:
    """Rows of a grammar's documents; each row is its own draw and begins with a document."""

    def __init__(self, grammar: Grammar, *, rows: int, length: int, seed: int) -> None:
        self._grammar = grammar
        self._rows = rows
        self._length = length
        self._seed = seed

    def batch(self, index: int) -> Batch:
        tokens_BL = np.empty((self._rows, self._length + 1), np.int64)
        document_BL = np.empty((self._rows, self._length + 1), np.int32)
        for row in range(self._rows):
            draws = _generator(self._seed, 1 + index * self._rows + row)
            filled = number = 0
            while filled <= self._length:
                ids = self._grammar.document(draws)[: self._length + 1 - filled]
                tokens_BL[row, filled : filled + len(ids)] = ids
                document_BL[row, filled : filled + len(ids)] = number
                filled += len(ids)
                number += 1
        return Batch(torch.from_numpy(tokens_BL), torch.from_numpy(document_BL))


def _zipf(count: int, exponent: float) -> Floats:
    weights = 1.0 / np.arange(1, count + 1) ** exponent
    return np.asarray(weights / weights.sum())


def _draw(chances: Floats, uniform: Floats) -> Symbols:
    above = np.cumsum(chances)
    return np.minimum(np.searchsorted(above, uniform, side="right"), len(chances) - 1)


def _entropy(chances: Floats) -> float:
    held = chances[chances > 0]
    return float(-(held * np.log(held)).sum())


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))
