"""An endless source whose entropy is known exactly: a model's loss has a number to reach.

Shapes: B rows, L tokens that are predicted in a row, S states (the last k tokens), V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fourfold.errors import ConfigError
from fourfold.train.data.batches import Batch

Floats = NDArray[np.float64]
_MOST_STATES = 1 << 16
_STATIONARY = 1e-13
_MOST_TURNS = 100_000


class MarkovSource:
    """Tokens that follow the last `order` ones by a random table. Documents of `document` tokens
    begin in the stationary distribution, so every place of a document has a known entropy."""

    def __init__(self, *, vocabulary: int, order: int, concentration: float, seed: int) -> None:
        """`concentration` of the Dirichlet distribution that the table's rows are drawn from: small
        for a source that is easy to predict. ConfigError for a table that is too large."""
        if vocabulary < 2 or order < 1 or not 0 < concentration < np.inf:
            raise ConfigError(
                "a Markov source needs a vocabulary of 2 or more, an order of 1 or more and a "
                "positive concentration"
            )
        states = vocabulary**order
        if states > _MOST_STATES:
            raise ConfigError(
                f"a Markov source of {vocabulary} tokens and order {order} has {states} states, "
                f"more than {_MOST_STATES}; lower one of them"
            )
        self.vocabulary = vocabulary
        self.order = order
        draws = _generator(seed, 0)
        self.table_SV: Floats = draws.dirichlet(np.full(vocabulary, concentration), size=states)
        self._above_SV = np.cumsum(self.table_SV, 1)
        self.stationary_S = _stationary(self.table_SV, vocabulary)
        self._stationary_above_S = np.cumsum(self.stationary_S)

    def tokens(self, uniform_BL: Floats) -> NDArray[np.int64]:
        """The documents that uniform numbers stand for, one a row and as long."""
        length = uniform_BL.shape[1]
        states = len(self.stationary_S)
        state_B = np.searchsorted(self._stationary_above_S, uniform_BL[:, 0], side="right")
        state_B = np.minimum(state_B, states - 1)
        tokens_BL = np.empty((len(uniform_BL), max(length, self.order)), np.int64)
        for place in range(self.order):
            digit = self.vocabulary ** (self.order - 1 - place)
            tokens_BL[:, place] = state_B // digit % self.vocabulary
        for place in range(self.order, length):
            above_BV = self._above_SV[state_B]
            token_B = (above_BV <= uniform_BL[:, place, None]).sum(1)
            tokens_BL[:, place] = np.minimum(token_B, self.vocabulary - 1)
            state_B = (state_B * self.vocabulary + tokens_BL[:, place]) % states
        return tokens_BL[:, :length]

    def entropy(self, place: int | None = None) -> float:
        """Nats that the token at a place of a document has, those before it known; without a place,
        the entropy rate, which every place from `order` on has."""
        if place is None or place >= self.order:
            return float(self.stationary_S @ _entropy(self.table_SV))
        before, after = (self._block_entropy(length) for length in (place, place + 1))
        return after - before

    def _block_entropy(self, length: int) -> float:
        """Of the first `length` tokens of a document, at most `order`."""
        blocks = self.stationary_S.reshape(self.vocabulary**length, -1).sum(1)
        return float(_entropy(blocks))


class MarkovBatches:
    """Rows of a Markov source; each row is its own draw."""

    def __init__(
        self, source: MarkovSource, *, rows: int, length: int, document: int, seed: int
    ) -> None:
        """Rows of `length` predicted tokens, cut into documents of `document` tokens."""
        if document < 2:
            raise ConfigError(f"a document of {document} tokens has nothing to predict; take 2")
        self._source = source
        self._rows = rows
        self._length = length
        self._document = document
        self._seed = seed

    @property
    def entropy(self) -> float:
        """Nats a predicted token: the loss that no model beats on average."""
        places = [p for p in (i % self._document for i in range(1, self._length + 1)) if p]
        return sum(map(self._source.entropy, places)) / len(places)

    def batch(self, index: int) -> Batch:
        documents = -(-(self._length + 1) // self._document)
        uniform_BL = np.stack(
            [
                _generator(self._seed, 1 + index * self._rows + row).random(
                    documents * self._document
                )
                for row in range(self._rows)
            ]
        )
        shape = self._rows * documents, self._document
        tokens_BL = self._source.tokens(uniform_BL.reshape(shape)).reshape(self._rows, -1)
        tokens = torch.from_numpy(tokens_BL[:, : self._length + 1].copy())
        number_L = torch.arange(self._length + 1, dtype=torch.int32) // self._document
        return Batch(tokens, number_L.expand(self._rows, -1).contiguous())


def _stationary(table_SV: Floats, vocabulary: int) -> Floats:
    """The distribution of states that a step leaves as it is. ConfigError where it is not found."""
    states = len(table_SV)
    now_S = np.full(states, 1.0 / states)
    for _ in range(_MOST_TURNS):
        # State s and token v lead to (s V + v) mod S: the oldest token is forgotten.
        flow_SV = now_S[:, None] * table_SV
        next_S = flow_SV.reshape(vocabulary, -1).sum(0)
        # Halfway, so that a source that goes in circles settles too.
        next_S = 0.5 * (now_S + next_S)
        if np.abs(next_S - now_S).sum() < _STATIONARY:
            settled_S: Floats = next_S
            return settled_S
        now_S = next_S
    raise ConfigError("a Markov source mixes too slowly to be known; raise its concentration")


def _entropy(chances: Floats) -> Floats:
    """Nats of distributions along the last axis."""
    logs = np.log(np.where(chances > 0, chances, 1.0))
    entropy: Floats = -(chances * logs).sum(-1)
    return entropy


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Numbers that depend on a seed and a stream alone."""
    return np.random.Generator(np.random.Philox(key=[seed, stream]))
