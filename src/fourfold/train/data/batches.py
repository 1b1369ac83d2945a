"""Batches whose content is a function of their number alone, so that a run resumes exactly.

Shapes: B rows, L tokens that are predicted in a row, N documents, R rows of an epoch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourfold.errors import ConfigError
from fourfold.train.data.shards import Places, Shards

_ROWS = 1 << 32
"""Added to an epoch's number where it is rows that are put in order, not documents."""
_READ_SECONDS = 600.0
"""How long one batch may take to read: a disk that takes longer does not come back."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens. Row i predicts `tokens[i, 1:]` from `tokens[i, :-1]`."""

    tokens: Tensor
    """int64 [B, L + 1]."""
    document: Tensor
    """int32 [B, L + 1]: which document of its row a token belongs to, from 0. A token is predicted
    from tokens of its own document only, and the first of a document not at all."""

    def rows(self, rank: int, world: int) -> Batch:
        """The rows of one of `world` ranks; ValueError where they cannot be dealt evenly."""
        share, rest = divmod(len(self.tokens), world)
        if rest:
            raise ValueError(f"{len(self.tokens)} rows cannot be dealt to {world} ranks evenly")
        mine = slice(rank * share, (rank + 1) * share)
        return Batch(self.tokens[mine], self.document[mine])


class Batches(Protocol):
    """An endless series of global batches."""

    def batch(self, index: int) -> Batch:
        """The batch of a number, from 0: the same whenever it is asked for."""
        ...


class ShardBatches:
    """Rows cut from the documents of shards, which every epoch concatenates in another order.

    A row's last token is the next row's first, so that in an epoch every token but a rest shorter
    than a row is predicted once. Rows are then put in an order of their own: those of one long
    document would else fill a batch. Both orders are functions of seed and epoch.
    """

    def __init__(self, shards: Shards, *, rows: int, length: int, seed: int) -> None:
        """`rows` of the global batch, `length` predicted tokens each. ConfigError where the shards
        hold less than a row."""
        tokens = int(shards.length_N.sum())
        self._rows_of_epoch = (tokens - 1) // length
        if self._rows_of_epoch < 1:
            raise ConfigError(
                f"the {shards.meta.split} split has {tokens} tokens, less than one row of "
                f"{length + 1}; tokenise more text or take shorter rows"
            )
        self._shards = shards
        self._rows = rows
        self._length = length
        self._seed = seed
        self._epoch = -1
        self._order_N: Places = np.zeros(0, np.int64)
        self._end_N: Places = np.zeros(0, np.int64)
        self._place_R: Places = np.zeros(0, np.int64)

    @property
    def batches_of_epoch(self) -> int:
        """Batches that lie wholly in the first epoch."""
        return self._rows_of_epoch // self._rows

    def batch(self, index: int) -> Batch:
        tokens_BL = np.empty((self._rows, self._length + 1), np.int64)
        document_BL = np.empty((self._rows, self._length + 1), np.int32)
        for row in range(self._rows):
            epoch, number = divmod(index * self._rows + row, self._rows_of_epoch)
            self._enter(epoch)
            begin = int(self._place_R[number]) * self._length
            self._fill(begin, tokens_BL[row], document_BL[row])
        return Batch(torch.from_numpy(tokens_BL), torch.from_numpy(document_BL))

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order_N = shuffled(len(self._shards.length_N), self._seed, epoch)
            self._end_N = np.cumsum(self._shards.length_N[self._order_N])
            self._place_R = shuffled(self._rows_of_epoch, self._seed, epoch + _ROWS)
            self._epoch = epoch

    def _fill(self, begin: int, tokens_L: NDArray[np.int64], document_L: NDArray[np.int32]) -> None:
        """Copies the tokens that lie at `begin` of this epoch's documents."""
        at = int(np.searchsorted(self._end_N, begin, side="right"))
        skipped = begin - (int(self._end_N[at - 1]) if at else 0)
        filled = number = 0
        while filled < len(tokens_L):
            ids = self._shards.document(int(self._order_N[at]))[skipped:]
            taken = ids[: len(tokens_L) - filled]
            tokens_L[filled : filled + len(taken)] = taken
            document_L[filled : filled + len(taken)] = number
            filled += len(taken)
            number += 1
            at += 1
            skipped = 0


def shuffled(count: int, seed: int, epoch: int) -> Places:
    """The numbers below `count` in an order that no version of a library changes."""
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
        places: Places = np.argsort(_mix(np.arange(count, dtype=np.uint64) + key), kind="stable")
    return places


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64: neighbouring numbers to numbers that look independent."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class ReadAhead:
    """Other batches, read by a thread before they are asked for. Close it to end the thread."""

    def __init__(self, batches: Batches, *, ahead: int = 4) -> None:
        """`ahead`: how many batches are kept that were not asked for yet."""
        self._batches = batches
        self._ahead = ahead
        # One thread: batches are read in turn, and need not be safe to be read by several.
        self._reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._pending: dict[int, concurrent.futures.Future[Batch]] = {}

    def batch(self, index: int) -> Batch:
        wanted = range(index, index + 1 + self._ahead)
        for number in [n for n in self._pending if n not in wanted]:
            self._pending.pop(number).cancel()
        for number in wanted:
            if number not in self._pending:
                self._pending[number] = self._reader.submit(self._batches.batch, number)
        return self._pending.pop(index).result(_READ_SECONDS)

    def close(self) -> None:
        """Ends the thread; harmless when repeated."""
        self._reader.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
