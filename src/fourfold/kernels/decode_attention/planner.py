"""Planning steps that follow each other, where little changes from one to the next.

A planner remembers page tables, what sequences share, how the last step was cut, and which way of
cutting the search chose. A sequence that grows by a token costs next to nothing, one that fills a
page has its own tasks changed, and one that comes new has the step cut again; only now and then, or
when the step has become another one, every candidate is priced again.

Shapes: B sequences, S slots.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fourfold.kernels.decode_attention.cost import DecodeCost
from fourfold.kernels.decode_attention.cutting import Cut, cut, grown
from fourfold.kernels.decode_attention.plan import (
    DecodePlan,
    DecodeSequences,
    DecodeShape,
    Ints,
)
from fourfold.kernels.decode_attention.search import Candidate, Shared, Step, Tree, cheapest
from fourfold.kernels.pages.layout import PAGE_TOKENS

_STEPS_BETWEEN_SEARCHES = 64
# How far batch size, pages and shared pages may move before the choice is made again.
_DRIFT = 1 / 8
_SLACK_PAGES = 16

Table = Sequence[int] | NDArray[np.int32]


class _PageTables:
    """The page tables of all slots in one array, each with room to grow."""

    def __init__(self) -> None:
        self.pages = np.zeros(1024, np.int32)
        self.end = 1
        self._starts_S, self._rooms_S, self._known_S = np.zeros((3, 16), np.int64)
        self._tables: list[Table | None] = [None] * 16

    def update(self, tables: Sequence[Table], slots_B: Ints, sealed_B: Ints, *, same: bool) -> Ints:
        """Makes the first `sealed_B` pages of each sequence known; returns where its table begins.

        `same`: every slot holds the sequence that it held before.
        """
        if not same:
            self._seat(tables, slots_B)
        for b in np.flatnonzero(self._known_S[slots_B] < sealed_B).tolist():
            slot, sealed = int(slots_B[b]), int(sealed_B[b])
            if sealed > self._rooms_S[slot] and not self._move(slot, sealed):
                self._lay_out_again(tables, slots_B, sealed_B)
                break
            known, start = int(self._known_S[slot]), int(self._starts_S[slot])
            new = tables[b][known:sealed]
            assert len(new) == sealed - known, "a sequence has fewer pages than tokens"
            self.pages[start + known : start + sealed] = new
            self._known_S[slot] = sealed
        starts_B: Ints = self._starts_S[slots_B]
        return starts_B

    def _seat(self, tables: Sequence[Table], slots_B: Ints) -> None:
        most = int(slots_B.max()) + 1
        if most > len(self._tables):
            more = 2 * most - len(self._tables)
            self._tables += [None] * more
            self._starts_S, self._rooms_S, self._known_S = (
                np.concatenate((values, np.zeros(more, np.int64)))
                for values in (self._starts_S, self._rooms_S, self._known_S)
            )
        for table, slot in zip(tables, slots_B.tolist(), strict=True):
            if self._tables[slot] is not table:
                self._tables[slot] = table
                self._known_S[slot] = 0

    def _move(self, slot: int, sealed: int) -> bool:
        """Gives a table more room at the end; False where there is none."""
        room = sealed + sealed // 8 + _SLACK_PAGES
        if self.end + room > len(self.pages):
            return False
        known, start = int(self._known_S[slot]), int(self._starts_S[slot])
        self.pages[self.end : self.end + known] = self.pages[start : start + known]
        self._starts_S[slot], self._rooms_S[slot] = self.end, room
        self.end += room
        return True

    def _lay_out_again(self, tables: Sequence[Table], slots_B: Ints, sealed_B: Ints) -> None:
        """Drops what nobody uses any more, and makes room for twice as much as is left."""
        rooms_B = sealed_B + sealed_B // 8 + _SLACK_PAGES
        ends_B = rooms_B.cumsum() + 1
        self.end = int(ends_B[-1])
        self.pages = np.zeros(2 * self.end, np.int32)
        self._rooms_S[:] = 0
        self._known_S[:] = 0
        self._starts_S[slots_B], self._rooms_S[slots_B] = ends_B - rooms_B, rooms_B
        self._known_S[slots_B] = sealed_B
        for table, start, sealed in zip(
            tables, (ends_B - rooms_B).tolist(), sealed_B.tolist(), strict=True
        ):
            assert len(table) >= sealed, "a sequence has fewer pages than tokens"
            self.pages[start : start + sealed] = table[:sealed]


class _Last(NamedTuple):
    """The step before."""

    sequences: DecodeSequences
    sealed_B: Ints
    starts_B: Ints
    tree: Tree
    """What the sequences share, as long as it is the same batch."""
    shared: Shared
    made: Cut
    plan: DecodePlan


class DecodePlanner:
    """Plans the steps of one model, one after another; one for each stream of steps."""

    def __init__(self, shape: DecodeShape, cost: DecodeCost) -> None:
        self._shape, self._cost = shape, cost
        self._tables = _PageTables()
        self._last: _Last | None = None
        self._chosen: Candidate | None = None
        self._steps_left = 0
        self._load = (0, 0, 0)

    def plan(self, sequences: DecodeSequences) -> DecodePlan:
        """A plan as `plan_decode` makes it, cut the way that was best not long ago.

        `pages` of a sequence are best its own list, which only grows while the sequence keeps its
        slot: it is recognised as the same object, and only what is new in it is read. A sequence
        whose earlier pages have changed must hand in another object. Slots are the sequences' own,
        small numbers.
        """
        last, tables = self._last, self._tables
        same = last is not None and _same_batch(sequences, last.sequences)
        sealed_B = sequences.sealed_B
        self._steps_left -= 1
        starts_B = tables.update(sequences.pages, sequences.open_slots_B, sealed_B, same=same)
        if last is not None and same:
            load = (len(sealed_B), int(sealed_B.sum()), last.tree.again)
            if not self._has_to_search(load):
                plan = self._grown(sequences, sealed_B, starts_B, last)
                if plan is not None:
                    return plan
        pages = tables.pages[: tables.end].copy()
        before = last if same else None
        step = Step(sequences, self._shape, pages, starts_B, before and before.tree)
        return self._cut(sequences, step, before and before.shared)

    def _has_to_search(self, load: tuple[int, int, int]) -> bool:
        """Whether the choice is old, or was made for another kind of step: other numbers of
        sequences, pages, and pages that are shared."""
        return self._steps_left < 0 or any(
            abs(now - then) > _DRIFT * then for now, then in zip(load, self._load, strict=True)
        )

    def _grown(
        self, sequences: DecodeSequences, sealed_B: Ints, starts_B: Ints, last: _Last
    ) -> DecodePlan | None:
        """The last plan with longer sequences; None where it has to be cut anew."""
        rows, made, before = self._shape.rows, last.made, last.plan
        if len(made.opened) != len(sealed_B):
            return None  # a sequence's rows are several tiles
        visible_B = sequences.lengths_B - rows + 1 - PAGE_TOKENS * sealed_B
        assert int(visible_B.min()) >= 1, "the new rows of a sequence cross a page"
        order_B, covered_B = last.tree.order_B, last.shared.covered_B
        moved = starts_B != last.starts_B
        changed_B = moved | (sealed_B != last.sealed_B)
        others: list[tuple[int, int, int]] = []
        if before.choice.sharing:
            if moved.any():
                return None
            visible_B, changed_B = visible_B[order_B], changed_B[order_B]
        for place in np.flatnonzero(changed_B).tolist():
            b, covered = place, 0
            if before.choice.sharing:
                b, covered = int(order_B[place]), int(covered_B[place])
            others.append((place, int(starts_B[b]) + covered, int(sealed_B[b]) - covered))
        tasks_J7 = grown(made, visible_B, others, before.choice.chunk)
        if tasks_J7 is None:
            return None
        if not others:
            return dataclasses.replace(before, tasks_J7=tasks_J7)
        pages = self._tables.pages[: self._tables.end].copy()
        plan = dataclasses.replace(before, tasks_J7=tasks_J7, pages=pages)
        made = made._replace(tasks_J7=tasks_J7)
        self._last = _Last(sequences, sealed_B, starts_B, last.tree, last.shared, made, plan)
        return plan

    def _cut(self, sequences: DecodeSequences, step: Step, shared: Shared | None) -> DecodePlan:
        """Cuts a step by the choice that was made, or by a new one. `shared` is what this batch
        shared before."""
        load = (len(step.sealed_B), int(step.sealed_B.sum()), step.tree.again)
        if self._chosen is None or self._has_to_search(load):
            self._chosen, self._load = cheapest(step, self._cost), load
            self._steps_left = _STEPS_BETWEEN_SEARCHES
        choice = self._chosen.choice
        if shared is None or shared.sharing is not choice.sharing:
            shared = step.shared(choice.sharing, self._cost)
        choice = choice._replace(sharing=shared.sharing)
        rows_R = step.rows_in_order(shared.sharing)
        made = cut(step.runs(shared), choice.chunk, self._shape, rows_R)
        plan = self._chosen._replace(step=step, choice=choice).plan_of(made, rows_R)
        self._last = _Last(sequences, step.sealed_B, step.starts_B, step.tree, shared, made, plan)
        return plan


def _same_batch(one: DecodeSequences, other: DecodeSequences) -> bool:
    """Whether the same sequences are in the same order."""
    return (
        len(one.pages) == len(other.pages)
        and all(map(operator.is_, one.pages, other.pages))
        and np.array_equal(one.open_slots_B, other.open_slots_B)
    )
