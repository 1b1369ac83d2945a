"""What a plan of decode attention is: which program reads which pages for which query rows.

Made on the host once per step, from lengths and page tables alone, and used by every layer. A
sequence's sealed pages are cut into pieces of about `chunk` pages (`cutting`); pages that several
sequences share can be read once for all of them (`siblings`). How fine to cut and what to share is
searched (`search`), and kept for a while (`planner`).

Query rows are numbered as in the batch: row b * Q + i is new row i of sequence b.

Shapes: B sequences, Q new rows of each, R = B * Q rows, H query heads, G KV heads, D = H / G query
heads that share one, J tasks.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fourfold.kernels.decode_attention.cost import Work
from fourfold.kernels.pages.layout import PAGE_TOKENS

Ints = NDArray[np.int64]

TILES = (16, 32, 64)
TASK_FIELDS = 7
TASK_CLASSES = tuple(32 * 4**i for i in range(9))
"""Tasks of a tile that kernels are launched for: few numbers, so that few graphs are captured."""


def class_of(number: int, classes: Sequence[int]) -> int:
    """The smallest class that holds so many."""
    return next(size for size in classes if size >= number)


class DecodeSequences(NamedTuple):
    """The sequences of a step."""

    lengths_B: Ints
    """Tokens, the new rows included; the new rows of a sequence lie in one page."""
    pages: Sequence[Sequence[int] | NDArray[np.int32]]
    """The sealed pages of each sequence in order; what follows them is ignored."""
    open_slots_B: Ints
    """Where each sequence's open page is."""

    @property
    def sealed_B(self) -> Ints:  # noqa: N802 (the suffix names its shape)
        """Sealed pages that the new rows attend to."""
        return (self.lengths_B - 1) // PAGE_TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """What all steps of a model have in common, and how many rows each sequence has."""

    heads: int
    kv_heads: int
    head_width: int
    rows: int = 1

    @property
    def shared(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def tile(self) -> int:
        """Rows of the tile that a sequence's own rows need."""
        needed = self.shared * self.rows
        return next((tile for tile in TILES if tile >= needed), TILES[-1])


class Sharing(enum.IntEnum):
    """Which pages are read once for several sequences; true where any are."""

    NONE = 0
    PAYING = 1
    """Those where reads that are saved cost more than the partials that are added."""
    ALL = 2
    """All where any read is saved: fewer tasks, which can spare a wave of them."""


class Choice(NamedTuple):
    """One way to cut a step into tasks."""

    chunk: int
    """Pages of a task at most."""
    sharing: Sharing


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Tasks and merges of one step, on the host; `PlanBuffers` takes them to a device."""

    shape: DecodeShape
    choice: Choice
    seconds: float
    """Predicted, when the choice was made."""
    work: Work
    """What the prediction is made of."""
    tiles: tuple[tuple[int, int], ...]
    """Rows of a tile, and how many tasks have such tiles; tasks lie in this order."""
    tasks_J7: NDArray[np.int32]
    """Work that every KV head has: first row, rows, first page, pages, open slot or -1, visible
    tokens of the open page for the first row (0 without one), first partial result of KV head 0 or
    -1 where the task writes the output itself."""
    rows_R: NDArray[np.int32]
    """The order of the query rows that tasks count in."""
    pages: NDArray[np.int32]
    """The page tables, one after another."""
    merge_starts_R: NDArray[np.int32]
    """[R + 1]: where each query row's partials begin in `merge_rows`."""
    merge_rows: NDArray[np.int32]
    """First partial of each (row, piece), for KV head 0."""
    stride: int
    """Partials of one KV head."""

    @property
    def partials(self) -> int:
        """Partial results, one of a query head each."""
        return self.stride * self.shape.kv_heads

    @property
    def merged(self) -> int:
        """Most partials of one row; 0 where nothing is merged."""
        return int(np.diff(self.merge_starts_R).max())
