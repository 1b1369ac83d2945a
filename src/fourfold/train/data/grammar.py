"""Made-up text that is built like text: a hierarchy of rules above words of Zipf frequencies.

A document has a topic, which says how likely each kind of sentence is. A sentence is a tree: its
root is replaced by two symbols of the level below, those by two each, and the lowest by words. No
two symbols of a level share a pair below them, and no two share a word, so a sentence has one tree
and its entropy is that of its choices, known exactly. Rules and words are drawn by Zipf's law: a
larger model has ever rarer rules left to learn.

Shapes: K kinds of sentences, M symbols of a level, R rules of a symbol, W words of a symbol,
Z topics, N sentences.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fourfold.train.data.grammar_config import GrammarConfig
from fourfold.train.data.shards import IdType, ShardWriter, SplitState, Vocabulary

Floats = NDArray[np.float64]
Symbols = NDArray[np.int64]
_SHARD_TOKENS = 1 << 26
_SPLITS = 1 << 62
"""Streams of random numbers from here on are those of splits; stream 0 draws the grammar."""


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


def write_grammar(grammar: Grammar, folder: Path, split: str, stream: int, tokens: int) -> int:
    """Writes a split of at least so many tokens; returns how many. Its documents are a function of
    the grammar and `stream`; there is no text, so a token counts as a byte."""
    config = grammar.config
    name = f"grammar-{config.seed}"
    size = [getattr(config, field.name) for field in dataclasses.fields(GrammarConfig)]
    vocabulary = Vocabulary(
        name=name,
        tokens=config.vocabulary,
        sha256=hashlib.sha256(repr(size).encode()).hexdigest(),
        end_of_text=1,
    )
    writer = ShardWriter(
        folder, IdType.for_vocabulary(config.vocabulary), _SHARD_TOKENS, SplitState()
    )
    draws = _generator(config.seed, _SPLITS + stream)
    written = 0
    while written < tokens:
        ids = grammar.document(draws)
        writer.add(ids.tolist(), len(ids))
        written += len(ids)
    writer.finish(split, vocabulary)
    return written


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
