"""Plans of decode attention: everything is read once, merges are complete, sharing pays."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.kernels.decode_attention import (
    DecodePlan,
    DecodeSequences,
    DecodeShape,
    PlanBuffers,
    PlanCapacity,
    candidate_plans,
    empty_partials,
    plan_decode,
)
from fourfold.kernels.decode_attention.cost import DecodeCost, Measurement, Work, fit
from fourfold.kernels.decode_attention.plan import Sharing
from fourfold.quadrants.costs import shipped_costs

COST = next(shipped_costs()).decode_attention
BANDWIDTH = next(shipped_costs()).limits.bandwidth
# Sharing costs nothing, so that plans share wherever they can.
EAGER = dataclasses.replace(COST, partial=0.0, further=0.0)


def make(lengths: list[int], tables: list[list[int]]) -> DecodeSequences:
    return DecodeSequences(
        np.array(lengths, np.int64),
        [np.array(table, np.int32) for table in tables],
        np.arange(len(lengths), dtype=np.int64)[::-1].copy(),
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[DecodeSequences, DecodeShape]:
    """Sequences that begin with pages of earlier ones, so that trees of any depth come about."""
    shape = DecodeShape(
        heads=draw(st.sampled_from([4, 8, 20])),
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        head_width=64,
        rows=draw(st.sampled_from([1, 2, 5, 16])),
    )
    lengths, tables = [], []
    fresh = 0
    for b in range(draw(st.integers(1, 9))):
        sealed = draw(st.sampled_from([0, 1, 2, 3, 7, 70]))
        inherited: list[int] = []
        if b and draw(st.booleans()):
            parent = tables[draw(st.integers(0, b - 1))]
            inherited = parent[: draw(st.integers(0, min(sealed, len(parent))))]
        own = list(range(fresh, fresh + sealed - len(inherited)))
        fresh += len(own)
        tables.append(inherited + own)
        lengths.append(sealed * 64 + draw(st.integers(shape.rows, 64)))
    return make(lengths, tables), shape


def check(plan: DecodePlan, sequences: DecodeSequences, shape: DecodeShape) -> None:
    """Every row reads each of its pages once, and its partials are merged."""
    total = len(sequences.lengths_B) * shape.rows
    assert sorted(plan.rows_R) == list(range(total))
    read: dict[int, Counter[int]] = defaultdict(Counter)
    partials: dict[int, list[int]] = defaultdict(list)
    direct: Counter[int] = Counter()
    opened: Counter[int] = Counter()
    written: Counter[int] = Counter()
    tile_of = [tile for tile, count in plan.tiles for _ in range(count)]
    assert len(tile_of) == len(plan.tasks_J7)
    for tile, task in zip(tile_of, plan.tasks_J7.tolist(), strict=True):
        first, rows, page, pages, slot, visible, partial = task
        assert 0 < rows * shape.shared <= tile
        for local, row in enumerate(plan.rows_R[first : first + rows].tolist()):
            read[row].update(plan.pages[page : page + pages].tolist())
            b, q = divmod(row, shape.rows)
            if slot >= 0:
                opened[row] += 1
                assert slot == sequences.open_slots_B[b]
                length = int(sequences.lengths_B[b])
                assert visible + local == length - shape.rows + q + 1 - 64 * ((length - 1) // 64)
            if partial < 0:
                direct[row] += 1
            else:
                start = partial + local * shape.shared
                partials[row].append(start)
                written.update(range(start, start + shape.shared))
    assert all(count == 1 for count in written.values())
    assert not written or max(written) < plan.stride
    for row in range(total):
        b = row // shape.rows
        own = list(sequences.pages[b][: sequences.sealed_B[b]])
        begin, end = plan.merge_starts_R[row : row + 2].tolist()
        assert read[row] == Counter(own)
        assert opened[row] == 1
        merged = plan.merge_rows[begin:end].tolist()
        assert sorted(merged) == sorted(partials[row])
        assert direct[row] == (0 if merged else 1)
        assert len(merged) != 1


@settings(max_examples=60, deadline=None)
@given(steps())
def test_every_page_is_read_once(step: tuple[DecodeSequences, DecodeShape]) -> None:
    sequences, shape = step
    for plan in candidate_plans(sequences, shape, EAGER):
        check(plan, sequences, shape)
    check(plan_decode(sequences, shape, COST), sequences, shape)


@settings(max_examples=60, deadline=None)
@given(steps())
def test_the_chosen_plan_is_the_cheapest_candidate(
    step: tuple[DecodeSequences, DecodeShape],
) -> None:
    sequences, shape = step
    chosen = plan_decode(sequences, shape, COST)
    plans = list(candidate_plans(sequences, shape, COST))
    cheapest = min(plan.seconds for plan in plans)
    assert cheapest <= chosen.seconds <= cheapest * 1.06
    # What sharing saves has to be sure.
    assert not chosen.choice.sharing or chosen.seconds == cheapest


def test_plans_that_share_are_timed_even_where_the_model_sees_no_gain_in_sharing() -> None:
    """A model that was fitted without them would otherwise never see any."""
    shape = DecodeShape(heads=8, kv_heads=1, head_width=64)
    sequences = make(
        [1000] * 4, [[*range(12), 12 + 3 * b, 13 + 3 * b, 14 + 3 * b] for b in range(4)]
    )
    cost = dataclasses.replace(COST, reread=0.0)
    assert not plan_decode(sequences, shape, cost).choice.sharing
    plans = list(candidate_plans(sequences, shape, cost))
    assert {plan.choice.sharing for plan in plans} == {Sharing.NONE, Sharing.ALL}
    for plan in plans:
        check(plan, sequences, shape)


@settings(max_examples=30, deadline=None)
@given(steps(), steps())
def test_buffers_take_any_plan_that_fits(
    one: tuple[DecodeSequences, DecodeShape], other: tuple[DecodeSequences, DecodeShape]
) -> None:
    """A plan in larger buffers, after another plan, is the same plan."""
    (sequences, shape), cpu = one, torch.device("cpu")
    plan = plan_decode(sequences, shape, COST)
    before = plan_decode(other[0], other[1], COST)
    capacity = PlanCapacity(
        rows=200,
        tasks=((16, 900), (32, 900), (64, 900)),
        pages=800,
        merges=9000,
        partials=99999,
        merged=64,
    )
    buffers = PlanBuffers(shape, capacity, cpu)
    if before.shape == shape:
        buffers.load(before)
    buffers.load(plan)
    tasks, header = buffers["tasks"].numpy().reshape(-1, 7), buffers["header"].tolist()
    assert header[0] == plan.stride
    assert dict(plan.tiles) == {
        tile: count for (tile, _), count in zip(capacity.tasks, header[1:], strict=True) if count
    }
    used, at = [], 0
    for (_, room), count in zip(capacity.tasks, header[1:], strict=True):
        used += tasks[at : at + count].tolist()
        at += room
    assert sorted(used) == sorted(plan.tasks_J7.tolist())
    starts = buffers["merge_starts"].numpy()
    assert np.array_equal(starts[: len(plan.merge_starts_R)], plan.merge_starts_R)
    assert (np.diff(starts)[len(plan.rows_R) :] == 0).all()
    assert np.array_equal(buffers["pages"].numpy()[: len(plan.pages)], plan.pages)
    assert not PlanBuffers(
        shape, dataclasses.replace(PlanCapacity.of(plan), rows=len(plan.rows_R) - 1), cpu
    ).fits(plan)


def test_siblings_read_their_prefix_once() -> None:
    prefix = list(range(128))
    tables = [[*prefix, 1000 + b] for b in range(8)]
    sequences = make([129 * 64 + 9] * 8, tables)
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    plan = plan_decode(sequences, shape, COST)
    reads = plan.tasks_J7[:, 3].sum()
    assert plan.choice.sharing
    assert reads == 128 + 8
    check(plan, sequences, shape)


@pytest.mark.parametrize(("own", "tiles"), [(1, [64]), (20, [64, 16])])
def test_few_own_pages_of_siblings_have_wide_tiles_too(own: int, tiles: list[int]) -> None:
    """One kernel, unless own pages are most of what is read."""
    tables = [[*range(128), *range(128 + own * b, 128 + own * (b + 1))] for b in range(32)]
    sequences = make([(128 + own) * 64 + 9] * 32, tables)
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    shared = [p for p in candidate_plans(sequences, shape, COST) if p.choice.sharing]
    for plan in shared:
        assert [tile for tile, _ in plan.tiles] == tiles
        check(plan, sequences, shape)
    assert shared


def test_no_plan_costs_less_than_its_longest_task() -> None:
    """Also where short tasks follow it, which find room beside it."""
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    lengths = [63 * 64 + 9] * 4 + [9] * 300
    tables = [list(range(63 * b, 63 * (b + 1))) for b in range(4)] + [[]] * 300
    sequences = make(lengths, tables)
    plans = {p.choice.chunk: p for p in candidate_plans(sequences, shape, COST)}
    assert plans[64].work.longest == 0
    assert plans[64].work.longest_of_all == 63
    assert plans[64].seconds > 63 * COST.page_alone
    assert plan_decode(sequences, shape, COST).choice.chunk < 32


def test_a_short_prefix_is_not_worth_a_merge() -> None:
    sequences = make([64 + 9] * 2, [[0], [0]])
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    assert not plan_decode(sequences, shape, COST).choice.sharing


def test_a_prefix_that_spares_a_wave_of_tasks_is_shared() -> None:
    """Its only page would not pay for the partials."""
    fresh = itertools.count()
    tables = [[next(fresh) for _ in range(sealed)] for sealed in (7, 0, 1, 1, 7, 7, 70)]
    tables[2] = tables[0][:1]
    sequences = make([64 * len(table) + 2 for table in tables], tables)
    shape = DecodeShape(heads=4, kv_heads=4, head_width=64, rows=2)
    plan = plan_decode(sequences, shape, COST)
    assert plan.choice.sharing is Sharing.ALL
    check(plan, sequences, shape)
    assert plan.tasks_J7[:, 3].sum() == sum(map(len, tables)) - 1


def test_groups_within_groups_are_shared_at_every_level() -> None:
    whole, half = list(range(40)), [list(range(100 + 40 * i, 140 + 40 * i)) for i in range(2)]
    tables = [whole + half[i // 4] + [500 + i] for i in range(8)]
    sequences = make([81 * 64 + 5] * 8, tables)
    shape = DecodeShape(heads=8, kv_heads=1, head_width=128)
    shared = [p for p in candidate_plans(sequences, shape, EAGER) if p.choice.sharing]
    for plan in shared:
        assert plan.tasks_J7[:, 3].sum() == 40 + 2 * 40 + 8
        check(plan, sequences, shape)
    assert shared


def test_rows_that_cross_a_page_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="cross a page"):
        plan_decode(
            make([65], [[0]]), DecodeShape(heads=8, kv_heads=2, head_width=64, rows=2), COST
        )


def test_fit_finds_the_coefficients_that_made_the_measurements() -> None:
    rng = np.random.default_rng(0)
    measurements = []
    for _ in range(80):
        tile, pages, longest = rng.choice([16, 64]), rng.integers(1, 60000), rng.integers(1, 64)
        merges = rng.integers(0, 2)
        numbers = {
            "steps": 1,
            "further": rng.integers(0, 2),
            "full": rng.uniform(),
            "longest": longest,
            "longest_rows": longest * tile,
            "longest_of_all": longest,
            "longest_rows_of_all": longest * tile,
            "many": rng.integers(0, 2),
            "second_pages": rng.integers(0, 2),
            "pages": pages,
            "rereads": rng.integers(0, 2) * rng.integers(0, 60000),
            "row_pages": pages * tile,
            "opened": rng.integers(1, 1000),
            "opened_beside": rng.integers(0, 2) * rng.integers(1, 300),
            "partials": merges * rng.integers(1, 30000),
            "merges": merges,
            "merged": merges * rng.integers(2, 100),
            "coded_apart": merges * rng.integers(0, 2),
        }
        work = Work(**{name: np.float64(value) for name, value in numbers.items()})
        measurements.append(Measurement(work, 128, float(COST.seconds(work, 128))))
    fitted = fit(measurements, "made up", 132, BANDWIDTH)
    assert isinstance(fitted, DecodeCost)
    assert fitted.hardware == "made up"
    predicted = np.array([float(fitted.seconds(m.work, 128)) for m in measurements])
    measured = np.array([m.seconds for m in measurements])
    assert np.abs(predicted / measured - 1).max() < 0.1


@pytest.mark.parametrize("timed", ["nothing shared", "sharing", "reading again costs nothing"])
def test_whatever_was_timed_sharing_survives_a_fit(timed: str) -> None:
    """Times that say that reading a page again costs nothing are times of something else."""
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    siblings = 1 if timed == "nothing shared" else 8
    true = dataclasses.replace(COST, reread=COST.reread * (timed == "sharing"))
    measurements = []
    for batch, pages in ((1, 8), (1, 60), (8, 14), (8, 130), (64, 7), (64, 64)):
        tables = [
            [*range(pages * (b - b % siblings), pages * (b - b % siblings + 1) - 1), 100_000 + b]
            for b in range(batch)
        ]
        plans = candidate_plans(make([pages * 64 + 9] * batch, tables), shape, true)
        measurements += [Measurement(plan.work, 128, plan.seconds) for plan in plans]
    fitted = fit(measurements, "made up", 132, BANDWIDTH)
    bytes_over_bandwidth = 2 * 64 * 128 / BANDWIDTH
    assert fitted.page >= 0.999 * bytes_over_bandwidth
    assert fitted.reread >= 0.999 * bytes_over_bandwidth / 4
    tables = [[*range(128 * (b // 8), 128 * (b // 8 + 1)), 10_000 + b] for b in range(64)]
    assert plan_decode(make([129 * 64 + 9] * 64, tables), shape, fitted).choice.sharing


@settings(max_examples=60, deadline=None)
@given(steps(), st.integers(0, 40))
def test_a_covering_capacity_holds_every_plan_of_as_many_tasks(
    step: tuple[DecodeSequences, DecodeShape], padding: int
) -> None:
    sequences, shape = step
    rows = len(sequences.lengths_B) * shape.rows + padding
    plans = list(candidate_plans(sequences, shape, EAGER))
    for plan in plans:
        capacity = PlanCapacity.covering(plan, rows)
        needed = PlanCapacity.of(plan)
        assert needed.merges <= capacity.merges
        assert needed.partials <= capacity.partials
        assert PlanCapacity.covering(plan, rows) == capacity
    largest = max((PlanCapacity.covering(plan, rows) for plan in plans), key=lambda c: c.partials)
    cpu = torch.device("cpu")
    partials = empty_partials(shape, largest, cpu)
    words = torch.full((PlanBuffers.words_needed(largest) + 8,), -7, dtype=torch.int32)
    for plan in plans:
        capacity = PlanCapacity.covering(plan, rows)
        if PlanBuffers.words_needed(capacity) > len(words) - 8:
            continue
        part = words[4:][: PlanBuffers.words_needed(capacity)]
        buffers = PlanBuffers(shape, capacity, cpu, words=part, partials=partials)
        buffers.load(plan)
        starts = buffers["merge_starts"].tolist()
        assert starts[len(plan.rows_R) :] == [len(plan.merge_rows)] * (padding + 1)
        assert buffers["pages"].data_ptr() - words.data_ptr() >= 16
        assert words[:4].tolist() == [-7] * 4


def test_plans_of_growing_sequences_need_few_capacities() -> None:
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    capacities = set()
    for length in range(300, 1300, 20):
        tables = np.split(np.arange(256 * 21), 256)
        sequences = make([length] * 256, [table.tolist() for table in tables])
        capacities.add(PlanCapacity.covering(plan_decode(sequences, shape, COST), 256))
    assert len(capacities) <= 3
