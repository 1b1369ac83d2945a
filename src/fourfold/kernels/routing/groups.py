"""What rows sorted by expert are, for the kernels that multiply them group by group.

A row is one (token, choice) pair, t * K + k. A tile is a run of at most `tile` rows of one expert;
the list of tiles is made on the device, so that nobody waits to learn how many rows an expert got.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowGroups(NamedTuple):
    """Rows sorted by expert, in their own order within an expert."""

    order_R: Tensor
    """int32: the flat row t * K + k at each sorted place."""
    ends_E: Tensor
    """int32: where each expert's rows end in the sorted order."""
    tile: int
    """Rows of a tile."""
    tiles_3N: Tensor
    """int32: each tile's expert, first row and its expert's end; the expert is -1 past the last."""


def choose_tile(rows: int, experts: int) -> int:
    """Rows of a tile, from the mean rows of an expert: a tile should hold what most experts get
    while a product waits for memory, and fill the tensor cores once it no longer does."""
    mean = rows / experts
    if mean <= 8:
        return 16
    if mean <= 24:
        return 32
    return 64 if mean <= 192 else 128


def most_tiles(rows: int, experts: int, tile: int) -> int:
    """The most tiles that any routing of the rows can make."""
    return rows // tile + min(rows, experts)
