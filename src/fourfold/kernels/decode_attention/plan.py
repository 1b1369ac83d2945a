"""Planning decode attention: which program reads which pages for which query rows.

Made on the host once per step, from lengths and page tables alone, and used by every layer. A
sequence's sealed pages are cut into pieces of about `chunk` pages; pages that several sequences
share can be read once for all of them (`siblings`). How fine to cut and what to share is searched:
every candidate is priced by a fitted cost model and the cheapest is built.

Query rows are numbered as in the batch: row b * Q + i is new row i of sequence b.

Shapes: B sequences, Q new rows of each, R = B * Q rows, H query heads, G KV heads, D = H / G query
heads that share one, J tasks, K candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fourfold.kernels.decode_attention.choose import programs_per_sm
from fourfold.kernels.decode_attention.cost import DecodeCost, Work
from fourfold.kernels.decode_attention.siblings import SharedRun, find_shared_runs
from fourfold.kernels.pages.layout import PAGE_TOKENS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TILES = (16, 32, 64)
CHUNKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Pages of a task at most."""
TASK_FIELDS = 8
_TASKS_PER_SM = 64
_SHARING_MARGIN = 1.05


class DecodeSequences(NamedTuple):
    """The sequences of a step."""

    lengths_B: Ints
    """Tokens, the new rows included; the new rows of a sequence lie in one page."""
    pages: Sequence[NDArray[np.int32]]
    """The sealed pages of each sequence in order; what follows them is ignored."""
    open_slots_B: Ints
    """Where each sequence's open page is."""

    @property
    def sealed_B(self) -> Ints:  # noqa: N802
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


class Runs(NamedTuple):
    """Runs of pages and the query rows that attend to them: arrays of one length."""

    first_row: Ints
    """Place in the row order."""
    rows: Ints
    first_page: Ints
    """Place in the concatenated page tables."""
    pages: Ints
    slot: Ints
    """The open page after the run, or -1."""
    visible: Ints
    """Tokens of the open page that the first row sees."""
    tile: Ints


class Choice(NamedTuple):
    """One way to cut a step into tasks."""

    chunk: int
    """Pages of a task at most."""
    sharing: bool
    """Whether pages are read once for several sequences, wherever that pays by itself."""


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """Tasks and merges of one step, on the host; `PlanBuffers` takes them to a device."""

    shape: DecodeShape
    choice: Choice
    seconds: float
    """Predicted."""
    work: Work
    tiles: tuple[tuple[int, int], ...]
    """Rows of a tile, and how many tasks have such tiles; tasks lie in this order."""
    tasks_J8: NDArray[np.int32]
    """First row, rows, KV head, first page, pages, open slot or -1, visible tokens of the open page
    for the first row, first partial result or -1 where the task writes the output itself."""
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


def plan_decode(sequences: DecodeSequences, shape: DecodeShape, cost: DecodeCost) -> DecodePlan:
    """The plan that the cost model prefers; see the module."""
    candidates = _candidates(_Step(sequences, shape), cost, most_tasks=_TASKS_PER_SM * cost.sms)
    return min(candidates, key=lambda candidate: candidate.price).build()


def candidate_plans(
    sequences: DecodeSequences, shape: DecodeShape, cost: DecodeCost
) -> Iterator[DecodePlan]:
    """Every plan there is, also what `plan_decode` does not look at because tasks would be too
    small: to measure what its choice loses."""
    for candidate in _candidates(_Step(sequences, shape), cost, most_tasks=None):
        yield candidate.build()


def _candidates(step: _Step, cost: DecodeCost, most_tasks: int | None) -> Iterator[_Candidate]:
    """All chunk sizes that differ, without and with sharing."""
    for sharing, runs in step.ways(cost):
        longest = int(runs.pages.max())
        small = (
            0 if most_tasks is None else int(runs.pages.sum()) * step.shape.kv_heads / most_tasks
        )
        chunks = [
            chunk
            for smaller, chunk in zip((0, *CHUNKS), CHUNKS, strict=False)
            if smaller <= max(0, longest - 1) and chunk >= min(small, CHUNKS[-1])
        ]
        work = step.work(runs, np.array(chunks), sharing, cost.sms)
        seconds_K = cost.seconds(work, step.shape.head_width).tolist()
        for k, chunk in enumerate(chunks):
            of_one = Work(*(field[k] for field in work))
            yield _Candidate(step, runs, Choice(chunk, sharing), of_one, seconds_K[k])


class _Candidate(NamedTuple):
    """A plan that is priced but not built."""

    step: _Step
    runs: Runs
    choice: Choice
    work: Work
    seconds: float

    @property
    def price(self) -> float:
        """Sharing has to be cheaper by more than the model errs, so as never to be slower."""
        return self.seconds * (_SHARING_MARGIN if self.choice.sharing else 1.0)

    def build(self) -> DecodePlan:
        return _build(self)


class _Step:
    """A step before it is cut."""

    def __init__(self, sequences: DecodeSequences, shape: DecodeShape) -> None:
        sealed_B = sequences.sealed_B
        count = len(sealed_B)
        assert count
        assert len(sequences.pages) == len(sequences.open_slots_B) == count
        visible_B = sequences.lengths_B - shape.rows + 1 - PAGE_TOKENS * sealed_B
        assert (visible_B >= 1).all(), "the new rows of a sequence cross a page"
        assert 0 < shape.shared <= TILES[-1]
        assert shape.shared * shape.kv_heads == shape.heads
        self.shape = shape
        self.sealed_B, self.visible_B = sealed_B, visible_B
        self.slots_B = np.asarray(sequences.open_slots_B, np.int64)
        tables = [table[:n] for table, n in zip(sequences.pages, sealed_B.tolist(), strict=True)]
        # One page too many, so that a task without pages may look at its first.
        self.pages = np.concatenate([*tables, np.zeros(1, np.int32)], dtype=np.int32)
        self.starts_B = np.cumsum(sealed_B) - sealed_B
        assert len(self.pages) == sealed_B.sum() + 1, "a sequence has fewer pages than tokens"
        self.order_B, self.nodes = find_shared_runs(self.pages, self.starts_B, sealed_B)
        again = sum((n.end - n.first - 1) * (n.stop - n.start) for n in self.nodes)
        self.unique_pages = len(self.pages) - 1 - again

    def ways(self, cost: DecodeCost) -> Iterator[tuple[bool, Runs]]:
        """Without sharing, and with all sharing that pays by itself."""
        none = np.zeros(len(self.order_B), np.int64)
        yield False, self._own_runs(none)
        accepted, covered_B = self._accept(cost)
        if accepted:
            shared = self._shared_runs(accepted)
            own = self._own_runs(covered_B)
            yield True, Runs(*map(np.concatenate, zip(shared, own, strict=True)))

    def work(self, runs: Runs, chunk_K: Ints, sharing: bool, sms: int) -> Work:
        """What each chunk size makes of the runs."""
        shape = self.shape
        pieces_KN = np.maximum(1, -(-runs.pages // chunk_K[:, None]))
        per_row_KN = pieces_KN
        if sharing:
            # Sums over the runs of each row, by differences at the rows where runs begin and end.
            length = int((runs.first_row + runs.rows).max()) + 1
            change_RK = np.zeros((length, len(chunk_K)), np.int64)
            np.add.at(change_RK, runs.first_row, pieces_KN.T)
            np.add.at(change_RK, runs.first_row + runs.rows, -pieces_KN.T)
            per_row_KN = change_RK.cumsum(0)[runs.first_row].T
        tiles_N = -(-runs.rows // (runs.tile // shape.shared))
        reads_N = tiles_N * runs.pages
        count_KN = pieces_KN * (tiles_N * shape.kv_heads)
        waves = _last_wave(runs, pieces_KN, count_KN, reads_N, sms, shape.head_width)
        most_K = per_row_KN.max(1)
        split_KN = np.where(per_row_KN > 1, pieces_KN, 0)
        once = np.ones(len(chunk_K))
        return Work(
            steps=once,
            further=once * (len(_tiles(runs.tile)) - 1),
            full=waves[0],
            longest=waves[1],
            longest_rows=waves[2],
            pages=once * (self.unique_pages * shape.kv_heads),
            rereads=once * ((reads_N.sum() - self.unique_pages) * shape.kv_heads),
            row_pages=once * ((reads_N * runs.tile).sum() * shape.kv_heads),
            opened=once * (len(self.order_B) * shape.kv_heads),
            tasks=count_KN.sum(1).astype(np.float64),
            partials=(split_KN @ runs.rows).astype(np.float64) * shape.heads,
            merges=(most_K > 1).astype(np.float64),
            merged=np.where(most_K > 1, most_K, 0).astype(np.float64),
        )

    def _accept(self, cost: DecodeCost) -> tuple[list[SharedRun], Ints]:
        """Nodes that save more than another partial of each sharer costs, and how many pages they
        cover of the sequence at each place of the order. What a node that is left out would have
        covered stays with the nodes below it."""
        covered_B = np.zeros(len(self.order_B), np.int64)
        accepted = []
        per_tile = TILES[-1] // self.shape.shared
        tiles_of_one = -(-self.shape.rows * self.shape.shared // self.shape.tile)
        extra = (cost.task + cost.partial * self.shape.shared) * self.shape.rows
        for node in self.nodes:
            sharers = node.end - node.first
            start = int(covered_B[node.first])
            reads = sharers * tiles_of_one - -(-sharers * self.shape.rows // per_tile)
            if reads * (node.stop - start) * cost.reread > sharers * extra:
                accepted.append(node._replace(start=start))
                covered_B[node.first : node.end] = node.stop
        return accepted, covered_B

    def _own_runs(self, covered_B: Ints) -> Runs:
        """What each sequence, in order, reads alone."""
        b = self.order_B
        rows = np.full(len(b), self.shape.rows, np.int64)
        return Runs(
            first_row=np.arange(len(b)) * self.shape.rows,
            rows=rows,
            first_page=self.starts_B[b] + covered_B,
            pages=self.sealed_B[b] - covered_B,
            slot=self.slots_B[b],
            visible=self.visible_B[b],
            tile=np.full(len(b), self.shape.tile, np.int64),
        )

    def _shared_runs(self, nodes: Sequence[SharedRun]) -> Runs:
        first, end, start, stop = np.array(nodes, np.int64).T
        rows = (end - first) * self.shape.rows
        wide = rows * self.shape.shared > self.shape.tile
        return Runs(
            first_row=first * self.shape.rows,
            rows=rows,
            first_page=self.starts_B[self.order_B[first]] + start,
            pages=stop - start,
            slot=np.full(len(first), -1, np.int64),
            visible=np.zeros(len(first), np.int64),
            tile=np.where(wide, TILES[-1], self.shape.tile),
        )


def _last_wave(
    runs: Runs, pieces_KN: Ints, count_KN: Ints, reads_N: Ints, sms: int, head_width: int
) -> tuple[Floats, Floats, Floats]:
    """What part of all reads precedes the last wave of tasks, most pages of a task of that wave,
    and most rows times pages; [K] each. Tasks start in the order in which `_build` puts them."""
    pages_KN = -(-runs.pages // pieces_KN)
    rows_N = runs.tile
    order_KN = np.argsort((-rows_N << 20) - pages_KN, axis=1)
    slots = {tile: programs_per_sm(tile, head_width) for tile in TILES}
    share_N = np.array([1 / slots[tile] for tile in rows_N.tolist()])
    used_KN = np.take_along_axis(count_KN * share_N, order_KN, 1).cumsum(1)
    before_K = np.floor((used_KN[:, -1] - 1e-9) / sms) * sms
    late_KN = used_KN > before_K[:, None]
    read_KN = np.where(late_KN, 0, reads_N[order_KN]).sum(1)
    # The run in which the last wave begins belongs to both.
    first_K = late_KN.argmax(1)[:, None]
    end_K = np.take_along_axis(used_KN, first_K, 1)[:, 0]
    n_K = np.take_along_axis(order_KN, first_K, 1)
    size_K = np.take_along_axis(count_KN * share_N, n_K, 1)[:, 0]
    early_K = 1 - (end_K - before_K) / size_K
    read_K = read_KN + reads_N[n_K[:, 0]] * early_K
    late_pages_KN = np.where(late_KN, np.take_along_axis(pages_KN, order_KN, 1), 0)
    late_rows_KN = late_pages_KN * rows_N[order_KN]
    return (
        read_K / max(1, reads_N.sum()),
        late_pages_KN.max(1).astype(np.float64),
        late_rows_KN.max(1).astype(np.float64),
    )


def _tiles(tile_N: Ints) -> list[tuple[int, int]]:
    """The tiles in use, and how often each is; wide ones first, for they take longest."""
    counts = ((tile, int((tile_N == tile).sum())) for tile in reversed(TILES))
    return [(tile, count) for tile, count in counts if count]


def _build(candidate: _Candidate) -> DecodePlan:
    """Cuts the runs into tasks and lists the merges."""
    step, runs, choice = candidate.step, candidate.runs, candidate.choice
    shape = step.shape
    pieces_N = np.maximum(1, -(-runs.pages // choice.chunk))
    per_tile_N = runs.tile // shape.shared
    tiles_N = -(-runs.rows // per_tile_N)
    count_N = pieces_N * tiles_N
    n = np.repeat(np.arange(len(count_N)), count_N)
    place = np.arange(len(n)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    pieces, per_tile = pieces_N[n], per_tile_N[n]
    piece, tile = place % pieces, place // pieces
    start = runs.pages[n] * piece // pieces
    pages = runs.pages[n] * (piece + 1) // pieces - start
    first_row = runs.first_row[n] + tile * per_tile
    rows = np.minimum(per_tile, runs.rows[n] - tile * per_tile)
    partial, merge_starts, merge_rows, stride = _merges(first_row, rows, step, shape)
    order = np.lexsort((-pages, -runs.tile[n]))
    kv_heads = np.arange(shape.kv_heads)
    tasks = np.empty((len(order), shape.kv_heads, TASK_FIELDS), np.int32)
    fields = (
        first_row,
        rows,
        None,
        runs.first_page[n] + start,
        pages,
        np.where(piece == pieces - 1, runs.slot[n], -1),
        runs.visible[n] + tile * per_tile,
        partial,
    )
    for i, field in enumerate(fields):
        if field is not None:
            tasks[:, :, i] = field[order, None]
    tasks[:, :, 2] = kv_heads
    tasks[:, :, 7] += np.where(partial[order, None] >= 0, kv_heads * stride, 0)
    rows_BQ = step.order_B[:, None] * shape.rows + np.arange(shape.rows)
    return DecodePlan(
        shape=shape,
        choice=choice,
        seconds=candidate.seconds,
        work=candidate.work,
        tiles=tuple((tile, count * shape.kv_heads) for tile, count in _tiles(runs.tile[n])),
        tasks_J8=tasks.reshape(-1, TASK_FIELDS),
        rows_R=rows_BQ.ravel().astype(np.int32),
        pages=step.pages,
        merge_starts_R=merge_starts,
        merge_rows=merge_rows,
        stride=stride,
    )


def _merges(
    first_row: Ints, rows: Ints, step: _Step, shape: DecodeShape
) -> tuple[Ints, NDArray[np.int32], NDArray[np.int32], int]:
    """For pieces of one KV head: the first partial of each (-1: none), the partials of each query
    row as starts and list, and how many there are. A row in one piece only needs no partial."""
    total = len(step.order_B) * shape.rows
    owner = np.repeat(np.arange(len(rows)), rows)
    local = np.arange(len(owner)) - np.repeat(np.cumsum(rows) - rows, rows)
    row = first_row[owner] + local
    split = np.bincount(row, minlength=total)[first_row] > 1
    size = np.where(split, rows * shape.shared, 0)
    base = np.cumsum(size) - size
    wanted = split[owner]
    batch_row = step.order_B[row[wanted] // shape.rows] * shape.rows + row[wanted] % shape.rows
    partial = (base[owner] + local * shape.shared)[wanted]
    order = np.argsort(batch_row, kind="stable")
    starts = np.zeros(total + 1, np.int64)
    np.cumsum(np.bincount(batch_row, minlength=total), out=starts[1:])
    return (
        np.where(split, base, -1),
        starts.astype(np.int32),
        partial[order].astype(np.int32),
        int(size.sum()),
    )
