"""Searching the plan of a step: every way to cut and to share is priced, and the cheapest built.

Shapes: B sequences, Q new rows of each, R = B * Q rows, N runs of pages, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fourfold.kernels.decode_attention.choose import are_few, most_at_once, programs_per_sm
from fourfold.kernels.decode_attention.cost import DecodeCost, Work
from fourfold.kernels.decode_attention.cutting import Cut, Runs, cut, pieces_of, start_order
from fourfold.kernels.decode_attention.plan import (
    TASK_CLASSES,
    TILES,
    Choice,
    DecodePlan,
    DecodeSequences,
    DecodeShape,
    Ints,
    Sharing,
    class_of,
)
from fourfold.kernels.decode_attention.siblings import SharedRun, find_shared_runs
from fourfold.kernels.pages.layout import PAGE_TOKENS

Floats = NDArray[np.float64]

CHUNKS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64)
"""Pages of a task at most."""
_TASKS_PER_SM = 64
_SHARING_MARGIN = 1.05
_MOST_NARROW = 1 / 4
"""Pages that narrow tiles would read, to those that wide tiles read, up to which all are wide."""


def plan_decode(sequences: DecodeSequences, shape: DecodeShape, cost: DecodeCost) -> DecodePlan:
    """The plan that the cost model prefers; see `plan`."""
    return cheapest(_step_of(sequences, shape), cost).build()


def candidate_plans(
    sequences: DecodeSequences, shape: DecodeShape, cost: DecodeCost
) -> Iterator[DecodePlan]:
    """Also what `plan_decode` does not look at because tasks would be too small: to measure what
    its choice loses, and to fit another model."""
    for candidate in _candidates(_step_of(sequences, shape), cost, most_tasks=None):
        yield candidate.build()


def cheapest(step: Step, cost: DecodeCost) -> Candidate:
    """The candidate with the lowest price."""
    candidates = _candidates(step, cost, most_tasks=_TASKS_PER_SM * cost.sms)
    return min(candidates, key=lambda candidate: candidate.price)


class Tree(NamedTuple):
    """What the sequences of a step share."""

    order_B: Ints
    """An order in which sharers are neighbours."""
    nodes: Sequence[SharedRun]

    @property
    def again(self) -> int:
        """Pages that would be read more than once without sharing, each time counted."""
        return sum((n.end - n.first - 1) * (n.stop - n.start) for n in self.nodes)


class Shared(NamedTuple):
    """The runs of a step that are read once for several sequences."""

    sharing: Sharing
    """By which they were chosen; NONE where there are none."""
    nodes: Sequence[SharedRun]
    covered_B: Ints
    """How many pages they cover of the sequence at each place of the order."""


class Step:
    """A step before it is cut."""

    def __init__(
        self,
        sequences: DecodeSequences,
        shape: DecodeShape,
        pages: NDArray[np.int32],
        starts_B: Ints,
        tree: Tree | None = None,
    ) -> None:
        """The table of sequence b begins at `pages[starts_B[b]]`, which is a page's number even if
        the table is empty. The tree is found unless given."""
        self.shape, self.pages, self.starts_B = shape, pages, starts_B
        self.sealed_B = sequences.sealed_B
        self.visible_B = sequences.lengths_B - shape.rows + 1 - PAGE_TOKENS * self.sealed_B
        self.slots_B = sequences.open_slots_B
        assert len(self.sealed_B) == len(sequences.pages) == len(self.slots_B) > 0
        assert int(self.visible_B.min()) >= 1, "the new rows of a sequence cross a page"
        assert 0 < shape.shared <= TILES[-1]
        assert shape.shared * shape.kv_heads == shape.heads
        self.tree = tree or Tree(*find_shared_runs(pages, starts_B, self.sealed_B))

    def runs(self, shared: Shared) -> Runs:
        """The shared ones, and what each sequence, in order, reads besides."""
        shape, b = self.shape, self.order(shared.sharing)
        own = Runs(
            first_row=np.arange(0, len(b) * shape.rows, shape.rows),
            rows=np.full(len(b), shape.rows, np.int64),
            first_page=self.starts_B[b] + shared.covered_B,
            pages=self.sealed_B[b] - shared.covered_B,
            slot=self.slots_B[b],
            visible=self.visible_B[b],
            tile=np.full(len(b), shape.tile, np.int64),
        )
        if not shared.nodes:
            return own
        return self._together(
            Runs(*map(np.concatenate, zip(self._shared_runs(shared.nodes), own, strict=True)))
        )

    def shared(self, sharing: Sharing, cost: DecodeCost) -> Shared:
        """The nodes that are shared. What one that is left out would have covered stays with the
        nodes below it."""
        covered_B = np.zeros(len(self.sealed_B), np.int64)
        chosen: list[SharedRun] = []
        per_tile = TILES[-1] // self.shape.shared
        tiles_of_one = -(-self.shape.rows * self.shape.shared // self.shape.tile)
        partials = cost.partial * self.shape.shared * self.shape.rows
        for node in self.tree.nodes if sharing else ():
            sharers = node.end - node.first
            start = int(covered_B[node.first])
            reads = sharers * tiles_of_one - -(-sharers * self.shape.rows // per_tile)
            saved = reads * (node.stop - start)
            pays = saved * cost.reread > sharers * partials
            if pays or (sharing is Sharing.ALL and saved > 0):
                chosen.append(node._replace(start=start))
                covered_B[node.first : node.end] = node.stop
        return Shared(sharing if chosen else Sharing.NONE, chosen, covered_B)

    def order(self, sharing: Sharing) -> Ints:
        """The sequences as runs count them, [B]."""
        return self.tree.order_B if sharing else np.arange(len(self.sealed_B))

    def rows_in_order(self, sharing: Sharing) -> NDArray[np.int32]:
        """The query row at each place of the row order, [R]."""
        rows = self.shape.rows
        rows_BQ = self.order(sharing)[:, None] * rows + np.arange(rows)
        return rows_BQ.ravel().astype(np.int32)

    def work(self, runs: Runs, chunk_K: Ints, sharing: Sharing, sms: int) -> Work:
        """What each chunk size makes of the runs."""
        shape = self.shape
        pieces_KN = pieces_of(runs.units, chunk_K[:, None])
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
        rows = len(self.sealed_B) * shape.rows
        few_K = self._few(runs, rows, count_KN)
        waves = _last_wave(runs, pieces_KN, count_KN, few_K, reads_N, sms, shape.head_width)
        second_K = np.where(few_K & (waves[1] > 1), 1.0, 0.0)
        most_K = per_row_KN.max(1)
        coded_apart_K = most_K > most_at_once(rows)
        split_KN = np.where(per_row_KN > 1, pieces_KN, 0)
        once = np.ones(len(chunk_K))
        unique_pages = int(self.sealed_B.sum()) - self.tree.again
        return Work(
            steps=once,
            further=once * (len(np.unique(runs.tile)) - 1),
            full=waves[0],
            longest=waves[1],
            longest_rows=waves[2],
            longest_of_all=waves[3],
            longest_rows_of_all=waves[4],
            many=np.where(few_K, 0.0, 1.0),
            second_pages=second_K,
            pages=once * (unique_pages * shape.kv_heads),
            rereads=once * ((reads_N.sum() - unique_pages) * shape.kv_heads),
            row_pages=once * ((reads_N * runs.tile).sum() * shape.kv_heads),
            opened=once * (len(self.sealed_B) * shape.kv_heads),
            opened_beside=second_K * (len(self.sealed_B) * shape.kv_heads),
            # A row that is coded apart is written and read once more.
            partials=(split_KN @ runs.rows + rows * coded_apart_K) * float(shape.heads),
            merges=(most_K > 1).astype(np.float64),
            merged=np.where(most_K > 1, most_K, 0).astype(np.float64),
            coded_apart=coded_apart_K.astype(np.float64),
        )

    def _few(self, runs: Runs, rows: int, count_KN: Ints) -> NDArray[np.bool_]:
        """Whether the kernel is made for few programs, [K], by how many each run has."""
        shape, tile = self.shape, int(runs.tile[0])
        if (runs.tile != tile).any():
            return np.zeros(len(count_KN), np.bool_)
        tasks_K = (count_KN.sum(1) // shape.kv_heads).tolist()
        few = [
            are_few(rows, ((tile, class_of(tasks, TASK_CLASSES)),), shape.kv_heads)
            for tasks in tasks_K
        ]
        return np.array(few)

    def _together(self, runs: Runs) -> Runs:
        """The same with wide tiles for all where most reads have wide tiles anyway: one kernel."""
        wide = runs.tile == TILES[-1]
        tiles_N = -(-runs.rows // (runs.tile // self.shape.shared))
        if _MOST_NARROW * (tiles_N * runs.units)[wide].sum() < runs.units[~wide].sum():
            return runs
        return runs._replace(tile=np.full_like(runs.tile, TILES[-1]))

    def _shared_runs(self, nodes: Sequence[SharedRun]) -> Runs:
        first, end, start, stop = np.array(nodes, np.int64).T
        rows = (end - first) * self.shape.rows
        wide = rows * self.shape.shared > self.shape.tile
        return Runs(
            first_row=first * self.shape.rows,
            rows=rows,
            first_page=self.starts_B[self.tree.order_B[first]] + start,
            pages=stop - start,
            slot=np.full(len(first), -1, np.int64),
            visible=np.zeros(len(first), np.int64),
            tile=np.where(wide, TILES[-1], self.shape.tile),
        )


class Candidate(NamedTuple):
    """A plan that is priced but not built."""

    step: Step
    runs: Runs
    choice: Choice
    work: Work
    seconds: float

    @property
    def price(self) -> float:
        """Sharing has to be cheaper by more: where the model errs it is not to be slower."""
        return self.seconds * (_SHARING_MARGIN if self.choice.sharing else 1.0)

    def build(self) -> DecodePlan:
        """The plan."""
        rows_R = self.step.rows_in_order(self.choice.sharing)
        return self.plan_of(cut(self.runs, self.choice.chunk, self.step.shape, rows_R), rows_R)

    def plan_of(self, made: Cut, rows_R: NDArray[np.int32]) -> DecodePlan:
        """The plan with the runs cut so."""
        return DecodePlan(
            shape=self.step.shape,
            choice=self.choice,
            seconds=self.seconds,
            work=self.work,
            tiles=made.tiles,
            tasks_J7=made.tasks_J7,
            rows_R=rows_R,
            pages=self.step.pages,
            merge_starts_R=made.merge_starts_R,
            merge_rows=made.merge_rows,
            stride=made.stride,
        )


def _step_of(sequences: DecodeSequences, shape: DecodeShape) -> Step:
    """With the page tables one after another."""
    sealed_B = sequences.sealed_B
    tables = [
        np.asarray(table[:n], np.int32)
        for table, n in zip(sequences.pages, sealed_B.tolist(), strict=True)
    ]
    # One page too many, so that a task without pages may look at its first.
    pages = np.concatenate([*tables, np.zeros(1, np.int32)])
    assert len(pages) == sealed_B.sum() + 1, "a sequence has fewer pages than tokens"
    return Step(sequences, shape, pages, sealed_B.cumsum() - sealed_B)


def _candidates(step: Step, cost: DecodeCost, most_tasks: int | None) -> Iterator[Candidate]:
    """All chunk sizes that differ, with nothing shared, with what pays, and with all."""
    tried: list[Sequence[SharedRun]] = []
    for sharing in Sharing:
        shared = step.shared(sharing, cost)
        if shared.nodes in tried:
            continue
        tried.append(shared.nodes)
        runs = step.runs(shared)
        longest = int(runs.units.max())
        small = (
            0 if most_tasks is None else int(runs.pages.sum()) * step.shape.kv_heads / most_tasks
        )
        chunks = [
            chunk for smaller, chunk in zip((0, *CHUNKS), CHUNKS, strict=False) if smaller < longest
        ]
        # Of the largest there are as few tasks as can be.
        chunks = [chunk for chunk in chunks if chunk >= small] or chunks[-1:]
        work = step.work(runs, np.array(chunks), sharing, cost.sms)
        seconds_K = cost.seconds(work, step.shape.head_width).tolist()
        for k, chunk in enumerate(chunks):
            of_one = Work(*(field[k] for field in work))
            yield Candidate(step, runs, Choice(chunk, sharing), of_one, seconds_K[k])


def _last_wave(
    runs: Runs,
    pieces_KN: Ints,
    count_KN: Ints,
    few_K: NDArray[np.bool_],
    reads_N: Ints,
    sms: int,
    head_width: int,
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """What part of all reads precedes the last wave of tasks, most pages of a task of that wave and
    most rows times pages, and the same two of all waves; [K] each."""
    units_KN = -(-runs.units // pieces_KN)
    rows_N = runs.tile
    order_KN = start_order(rows_N, units_KN)
    pages_KN = np.where(pieces_KN == 1, runs.pages, units_KN)
    share_KN = np.empty(count_KN.shape)
    for few in (False, True):
        slots = {tile: programs_per_sm(tile, head_width, few=few) for tile in TILES}
        share_KN[few_K == few] = [1 / slots[tile] for tile in rows_N.tolist()]
    used_KN = np.take_along_axis(count_KN * share_KN, order_KN, 1).cumsum(1)
    before_K = np.floor((used_KN[:, -1] - 1e-9) / sms) * sms
    late_KN = used_KN > before_K[:, None]
    read_KN = np.where(late_KN, 0, reads_N[order_KN]).sum(1)
    # The run in which the last wave begins belongs to both.
    first_K = late_KN.argmax(1)[:, None]
    end_K = np.take_along_axis(used_KN, first_K, 1)[:, 0]
    n_K = np.take_along_axis(order_KN, first_K, 1)
    size_K = np.take_along_axis(count_KN * share_KN, n_K, 1)[:, 0]
    early_K = 1 - (end_K - before_K) / size_K
    read_K = read_KN + reads_N[n_K[:, 0]] * early_K
    late_pages_KN = np.where(late_KN, np.take_along_axis(pages_KN, order_KN, 1), 0)
    late_rows_KN = late_pages_KN * rows_N[order_KN]
    return (
        read_K / max(1, reads_N.sum()),
        late_pages_KN.max(1).astype(np.float64),
        late_rows_KN.max(1).astype(np.float64),
        pages_KN.max(1).astype(np.float64),
        (pages_KN * rows_N).max(1).astype(np.float64),
    )
