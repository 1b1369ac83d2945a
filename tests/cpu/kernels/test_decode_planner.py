"""Plans of steps that follow each other: those that planning each step afresh would give."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.kernels.decode_attention import (
    DecodeCost,
    DecodePlan,
    DecodePlanner,
    DecodeSequences,
    DecodeShape,
    candidate_plans,
    plan_decode,
    planner,
    search,
)
from fourfold.kernels.decode_attention.plan import Sharing
from tests.cpu.kernels.test_decode_plan import COST, EAGER, check


class Batch:
    """Sequences that come, grow, fork, go, and are moved to other pages."""

    def __init__(self, shape: DecodeShape) -> None:
        self.shape = shape
        self.pages: dict[int, list[int]] = {}  # by slot
        self.lengths: dict[int, int] = {}
        self._fresh: Iterator[int] = itertools.count(1000)

    def come(self, length: int, parent: int | None = None) -> None:
        slot = next(slot for slot in itertools.count() if slot not in self.pages)
        inherited = [] if parent is None else self.pages[parent][: self.lengths[parent] // 64]
        self.pages[slot] = list(inherited)
        self.lengths[slot] = max(length, 64 * len(inherited) + self.shape.rows)
        self._fill(slot)

    def grow(self) -> None:
        for slot in self.lengths:
            self.lengths[slot] += self.shape.rows
            over = self.lengths[slot] % 64
            if 0 < over < self.shape.rows:
                self.lengths[slot] += self.shape.rows - over
            self._fill(slot)

    def go(self, slot: int) -> None:
        del self.pages[slot], self.lengths[slot]

    def move(self, slot: int) -> None:
        """As after a preemption: to other pages, named by another list."""
        self.pages[slot] = []
        self._fill(slot)

    def _fill(self, slot: int) -> None:
        while len(self.pages[slot]) * 64 < self.lengths[slot]:
            self.pages[slot].append(next(self._fresh))

    def sequences(self, order: list[int]) -> DecodeSequences:
        return DecodeSequences(
            np.array([self.lengths[slot] for slot in order], np.int64),
            [self.pages[slot] for slot in order],
            np.array(order, np.int64),
        )


def assert_same(plan: DecodePlan, fresh: DecodePlan) -> None:
    """All but where in memory page tables lie, and which tasks of a tile come first."""
    assert plan.tiles == fresh.tiles
    assert plan.stride == fresh.stride
    for name in ("rows_R", "merge_starts_R", "merge_rows"):
        assert np.array_equal(getattr(plan, name), getattr(fresh, name)), name
    elsewhere = [0, 1, 3, 4, 5, 6]
    assert sorted(plan.tasks_J7[:, elsewhere].tolist()) == sorted(
        fresh.tasks_J7[:, elsewhere].tolist()
    )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_step_is_planned_as_if_it_were_the_first(data: st.DataObject) -> None:
    shape = DecodeShape(
        heads=8, kv_heads=2, head_width=64, rows=data.draw(st.sampled_from([1, 1, 2, 8]))
    )
    cost = data.draw(st.sampled_from([COST, EAGER]))
    batch, ours = Batch(shape), DecodePlanner(shape, cost)
    batch.come(data.draw(st.integers(1, 6)) * 64 + shape.rows)
    for _ in range(data.draw(st.integers(1, 12))):
        slots = list(batch.lengths)
        event = data.draw(st.sampled_from(["grow", "grow", "grow", "come", "fork", "go", "move"]))
        if event == "come":
            batch.come(data.draw(st.sampled_from([0, 1, 40, 64, 90])) * 64 + shape.rows)
        elif event == "fork":
            batch.come(0, parent=data.draw(st.sampled_from(slots)))
        elif event == "go" and len(slots) > 1:
            batch.go(data.draw(st.sampled_from(slots)))
        elif event == "move":
            batch.move(data.draw(st.sampled_from(slots)))
        else:
            batch.grow()
        order = sorted(batch.lengths, key=lambda slot: data.draw(st.integers(0, 3)))
        sequences = batch.sequences(order)
        plan = ours.plan(sequences)
        check(plan, sequences, shape)
        if not plan.choice.sharing:
            step = search._step_of(sequences, shape)
            candidate = search.cheapest(step, cost)._replace(
                choice=plan.choice, runs=step.runs(step.shared(Sharing.NONE, cost))
            )
            assert_same(plan, candidate.build())


def test_a_sequence_that_grows_is_searched_again_before_its_plan_is_bad() -> None:
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    batch, ours = Batch(shape), DecodePlanner(shape, COST)
    batch.come(70)
    for length in range(70, 20_000, 17):
        batch.lengths[0] = length
        batch._fill(0)
        sequences = batch.sequences([0])
        choice = ours.plan(sequences).choice
        best = plan_decode(sequences, shape, COST).seconds
        (price,) = (
            (
                plan.seconds
                for plan in candidate_plans(sequences, shape, COST)
                if plan.choice.chunk == choice.chunk
            )
            if choice.chunk <= -(-length // 64)
            else (best,)
        )
        assert price <= 1.1 * best


@pytest.mark.parametrize(("kv_heads", "rows"), [(32, 320), (16, 1024), (4, 2500)])
def test_batches_of_more_programs_than_are_wanted_have_a_plan(kv_heads: int, rows: int) -> None:
    shape = DecodeShape(heads=32, kv_heads=kv_heads, head_width=128)
    pages = [list(range(8 * row, 8 * row + 8)) for row in range(rows)]
    sequences = DecodeSequences(np.full(rows, 500), pages, np.arange(rows))
    plan = DecodePlanner(shape, COST).plan(sequences)
    assert len(plan.rows_R) == rows


def test_what_is_shared_is_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way of sharing the search takes next, for the same batch or another."""
    rng, kept = random.Random(3), Counter[tuple[Sharing, Sharing]]()
    chosen: list[Sharing] = []

    def any_of(step: search.Step, cost: DecodeCost) -> search.Candidate:
        candidates = list(search._candidates(step, cost, most_tasks=None))
        sharing = rng.choice(sorted({each.choice.sharing for each in candidates}))
        chosen.append(sharing)
        return rng.choice([each for each in candidates if each.choice.sharing is sharing])

    monkeypatch.setattr(planner, "cheapest", any_of)
    monkeypatch.setattr(planner, "_STEPS_BETWEEN_SEARCHES", 3)
    for _ in range(30):
        shape = DecodeShape(heads=8, kv_heads=2, head_width=64, rows=rng.choice([1, 2, 16]))
        batch, ours = Batch(shape), DecodePlanner(shape, COST)
        for _ in range(rng.randint(1, 3)):
            batch.come(rng.choice([1, 3, 40, 70]) * 64 + shape.rows)
        for _ in range(rng.randint(1, 5)):
            batch.come(rng.choice([0, 192]), parent=rng.choice(list(batch.lengths)))
        before = Sharing.NONE
        for _ in range(20):
            if rng.random() < 0.1:
                batch.come(0, parent=rng.choice(list(batch.lengths)))
            batch.grow()
            sequences = batch.sequences(list(batch.lengths))
            plan = ours.plan(sequences)
            check(plan, sequences, shape)
            step = search._step_of(sequences, shape)
            shared = step.shared(chosen[-1], COST)
            assert plan.choice.sharing is shared.sharing
            runs = step.runs(shared)
            tiles = -(-runs.rows // (runs.tile // shape.shared))
            assert plan.tasks_J7[:, 3].sum() == (tiles * runs.pages).sum()
            kept[before, plan.choice.sharing] += 1
            before = plan.choice.sharing
    assert len(kept) == len(Sharing) ** 2


def test_choices_are_kept_while_a_batch_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    cheapest = planner.cheapest
    monkeypatch.setattr(planner, "cheapest", lambda *step: searches.append(step) or cheapest(*step))
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    batch, ours = Batch(shape), DecodePlanner(shape, COST)
    for number in range(64):
        batch.come(1000 + 31 * number)
    for _ in range(60):
        batch.grow()
        ours.plan(batch.sequences(list(batch.lengths)))
    assert len(searches) == 1
    for _ in range(10):
        batch.come(1500)
    ours.plan(batch.sequences(list(batch.lengths)))
    assert len(searches) == 2
