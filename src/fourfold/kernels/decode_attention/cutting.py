"""Cutting runs of pages into tasks, and listing what has to be merged.

The open page counts like any other; it belongs to the last task of its run, alone if need be.
Tasks with wide tiles come first, for they take longest, then those with most pages; the pieces of a
run lie together.

Shapes: N runs, J tasks, R query rows, P pairs of a query row and a run that covers it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fourfold.kernels.decode_attention.plan import TASK_FIELDS, TILES, DecodeShape, Ints

_FIRST_ROW, _ROWS, _FIRST_PAGE, _PAGES, _SLOT, _VISIBLE, _PARTIAL = range(TASK_FIELDS)


class Runs(NamedTuple):
    """Runs of pages and the query rows that attend to them: arrays of one length.

    Every row has one run that ends with its open page, and perhaps others.
    """

    first_row: Ints
    """Place in the row order."""
    rows: Ints
    first_page: Ints
    """Place in the page tables."""
    pages: Ints
    slot: Ints
    """The open page after the run, or -1."""
    visible: Ints
    """Tokens of the open page that the first row sees."""
    tile: Ints

    @property
    def units(self) -> Ints:
        """Pages, the open one included."""
        return self.pages + (self.slot >= 0)


class Cut(NamedTuple):
    """Runs that are cut: parts of a `DecodePlan`."""

    tiles: tuple[tuple[int, int], ...]
    tasks_J7: NDArray[np.int32]
    merge_starts_R: NDArray[np.int32]
    merge_rows: NDArray[np.int32]
    stride: int
    opened: Ints
    """The tasks with an open page, in the order of the runs that have one."""
    pieces: Ints
    """How many tasks each of these runs is cut into; that with the open page is the last."""


def cut(runs: Runs, chunk: int, shape: DecodeShape, rows_R: NDArray[np.int32]) -> Cut:
    """Tasks of `chunk` pages at most, the open one included.

    `rows_R` is the query row at each place of the row order.
    """
    runs = one_tile_each(runs, shape)
    units_N = runs.units
    pieces_N = pieces_of(units_N, chunk)
    partial_N, merge_starts_R, merge_rows, stride = _merges(runs, pieces_N, shape, rows_R)
    units_N, longer_N = np.divmod(units_N, pieces_N)
    order_N = start_order(runs.tile, units_N + (longer_N > 0))
    end_N = np.empty_like(order_N)
    end_N[order_N] = pieces_N[order_N].cumsum()
    fields_N = np.empty((len(order_N), TASK_FIELDS + 3), np.int32)
    fields_N[:, _FIRST_ROW] = runs.first_row
    fields_N[:, _ROWS] = runs.rows
    fields_N[:, _FIRST_PAGE] = runs.first_page
    fields_N[:, _PAGES] = units_N
    fields_N[:, _SLOT] = -1
    fields_N[:, _VISIBLE] = 0
    fields_N[:, _PARTIAL] = partial_N
    fields_N[:, -3] = longer_N
    fields_N[:, -2] = runs.rows * shape.shared
    fields_N[:, -1] = end_N - pieces_N
    fields_J = fields_N[order_N].repeat(pieces_N[order_N], 0)
    tasks_J7 = fields_J[:, :TASK_FIELDS]
    place_J = np.arange(len(fields_J), dtype=np.int32) - fields_J[:, -1]
    longer_J = fields_J[:, -3]
    # The first pieces of a run take what does not divide evenly, a page each.
    tasks_J7[:, _FIRST_PAGE] += place_J * tasks_J7[:, _PAGES] + np.minimum(place_J, longer_J)
    tasks_J7[:, _PAGES] += place_J < longer_J
    if stride:
        split_J = tasks_J7[:, _PARTIAL] >= 0
        tasks_J7[:, _PARTIAL] += place_J * fields_J[:, -2] * split_J
    with_slot = runs.slot >= 0
    opened = end_N[with_slot] - 1
    tasks_J7[opened, _PAGES] -= 1
    tasks_J7[opened, _SLOT] = runs.slot[with_slot]
    tasks_J7[opened, _VISIBLE] = runs.visible[with_slot]
    tiles = _tile_counts(runs.tile, pieces_N)
    return Cut(tiles, tasks_J7, merge_starts_R, merge_rows, stride, opened, pieces_N[with_slot])


def grown(
    made: Cut, visible: Ints, pages: Iterable[tuple[int, int, int]], chunk: int
) -> NDArray[np.int32] | None:
    """The tasks when runs with open pages, numbered in their order, have grown.

    `visible` are the visible tokens of all of them; `pages` names those that have other pages, with
    the first page and how many. None if one of them has to be cut into more pieces. Tasks keep
    their places.
    """
    tasks_J7 = made.tasks_J7.copy()
    tasks_J7[made.opened, _VISIBLE] = visible
    for run, first_page, count in pages:
        pieces, last = int(made.pieces[run]), int(made.opened[run])
        if -(-(count + 1) // chunk) != pieces:
            return None
        units, longer = divmod(count + 1, pieces)
        place = np.arange(pieces)
        tasks = tasks_J7[last + 1 - pieces : last + 1]
        tasks[:, _FIRST_PAGE] = first_page + place * units + np.minimum(place, longer)
        tasks[:, _PAGES] = units + (place < longer)
        tasks_J7[last, _PAGES] -= 1
    return tasks_J7


def pieces_of(units: Ints, chunk: int | Ints) -> Ints:
    """How many tasks of `chunk` pages at most a run is cut into."""
    return -(-units // chunk)


def start_order(tile: Ints, units: Ints) -> Ints:
    """The order of runs, along the last axis, whose tasks have such tiles and pages at most."""
    return np.argsort(-((tile << 24) + units), axis=-1, kind="stable")


def one_tile_each(runs: Runs, shape: DecodeShape) -> Runs:
    """The same with runs of more rows than a tile holds as several."""
    per_tile_N = runs.tile // shape.shared
    if (runs.rows <= per_tile_N).all():
        return runs
    tiles_N = -(-runs.rows // per_tile_N)
    runs = Runs(*(field.repeat(tiles_N) for field in runs))
    per_tile_N = per_tile_N.repeat(tiles_N)
    before_N = np.arange(len(runs.rows)) - (tiles_N.cumsum() - tiles_N).repeat(tiles_N)
    before_N *= per_tile_N
    return runs._replace(
        first_row=runs.first_row + before_N,
        rows=np.minimum(per_tile_N, runs.rows - before_N),
        visible=runs.visible + before_N,
    )


def _merges(
    runs: Runs, pieces_N: Ints, shape: DecodeShape, rows_R: NDArray[np.int32]
) -> tuple[Ints, NDArray[np.int32], NDArray[np.int32], int]:
    """For one KV head: the first partial of each run (-1: none), the partials of each query row as
    starts and list, and how many there are. A row in one piece needs no partial."""
    total = len(rows_R)
    if len(runs.rows) == total and shape.rows == 1:
        # Each row has a run of its own, in their order.
        count_N = np.where(pieces_N > 1, pieces_N, 0)
        starts = np.zeros(total + 1, np.int32)
        np.cumsum(count_N, out=starts[1:])
        first_N = np.where(pieces_N > 1, starts[:-1] * shape.shared, -1)
        merged = int(starts[-1])
        rows = np.arange(merged, dtype=np.int32) * np.int32(shape.shared)
        return first_N, starts, rows, merged * shape.shared
    run_P = np.arange(len(runs.rows)).repeat(runs.rows)
    local_P = np.arange(len(run_P)) - (runs.rows.cumsum() - runs.rows).repeat(runs.rows)
    place_P = runs.first_row[run_P] + local_P
    pieces_R = np.bincount(place_P, weights=pieces_N[run_P], minlength=total)
    # Rows of one run are split together.
    split_N = pieces_R[runs.first_row] > 1
    size_N = np.where(split_N, pieces_N * runs.rows * shape.shared, 0)
    first_N = size_N.cumsum() - size_N
    row_P = rows_R[place_P]
    by_row_P = np.argsort(row_P, kind="stable")
    run_P, local_P, row_P = run_P[by_row_P], local_P[by_row_P], row_P[by_row_P]
    count_P = np.where(split_N[run_P], pieces_N[run_P], 0)
    starts = np.zeros(total + 1, np.int32)
    starts[1:] = np.bincount(row_P, weights=count_P, minlength=total).cumsum()
    piece = np.arange(int(starts[-1])) - (count_P.cumsum() - count_P).repeat(count_P)
    partials_P = runs.rows[run_P] * shape.shared
    rows = (first_N[run_P] + local_P * shape.shared).repeat(count_P)
    rows += piece * partials_P.repeat(count_P)
    first_N = np.where(split_N, first_N, -1)
    return first_N, starts, rows.astype(np.int32), int(size_N.sum())


def _tile_counts(tile_N: Ints, pieces_N: Ints) -> tuple[tuple[int, int], ...]:
    """The tiles in use, and how many tasks have each; wide ones first."""
    first = int(tile_N[0])
    if (tile_N == first).all():
        return ((first, int(pieces_N.sum())),)
    counts = ((tile, int(pieces_N[tile_N == tile].sum())) for tile in reversed(TILES))
    return tuple((tile, count) for tile, count in counts if count)
