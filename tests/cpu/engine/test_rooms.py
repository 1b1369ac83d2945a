"""Steps are rounded up to few rooms, each of which holds them."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest

from fourfold.engine.config import EngineConfig
from fourfold.engine.graphs import (
    _MOST_GRAPHS,
    _Key,
    round_room,
    sampled_rows,
    usual_decode_rows,
)
from fourfold.engine.sampler import Adjustment
from fourfold.engine.warming import largest_work, usual_decodes, usual_steps
from fourfold.kernels.decode_attention import DecodePlanner, DecodeShape, PlanCapacity
from fourfold.kernels.prefill_attention import PrefillRoom
from fourfold.quadrants.costs import QuadrantCosts, shipped_costs
from fourfold.quadrants.kv_pages import PAGE_TOKENS, Span
from fourfold.quadrants.step import CodedWork, StepRoom

MAX_PAGES = 640
SHAPE = DecodeShape(heads=32, kv_heads=4, head_width=128)


def work(decodes: int, prompts: list[int]) -> CodedWork:
    return CodedWork(
        [Span(100, 1, [0, 1], slot) for slot in range(decodes)],
        [Span(0, rows, range(-(-rows // PAGE_TOKENS))) for rows in prompts],
        None,
    )


def test_a_room_holds_its_step_and_wastes_little() -> None:
    random = Random(0)
    for _ in range(500):
        decodes = random.choice((0, 1, 3, 17, 100, 256, 700))
        prompts = [random.randrange(64, 4000) for _ in range(random.choice((0, 1, 2, 9)))]
        if not decodes and not prompts:
            continue
        room = round_room(work(decodes, prompts), MAX_PAGES)
        assert room is not None
        assert room.decode_rows >= decodes
        assert room.prefill_rows >= sum(prompts)
        assert room.prefill_rows % PAGE_TOKENS == 0
        assert room.prefill_rows <= PAGE_TOKENS + 1.25 * sum(prompts)
        assert sampled_rows(room) >= decodes + len(prompts)
        assert (room.decode_rows == 0) == (decodes == 0)


def test_there_are_few() -> None:
    rooms = {
        round_room(work(decodes, [rows] if rows else []), MAX_PAGES)
        for decodes in range(1, 257)
        for rows in (0, *range(1, 16384, 301))
    }
    assert len(rooms) < 200


def test_short_prompts_share_a_step_as_far_as_that_is_worth_a_graph() -> None:
    assert round_room(work(1, [10] * 100), MAX_PAGES) is not None
    assert round_room(work(1, [1] * 100), MAX_PAGES) is None


def test_usual_rows_end_with_the_most_that_run() -> None:
    assert usual_decode_rows(1) == [1]
    assert usual_decode_rows(20) == [1, 2, 4, 8, 16, 20]
    assert usual_decode_rows(256)[-1] == 256


@pytest.mark.parametrize("max_context", [150, 4000, 40960])
def test_no_step_needs_a_larger_room_than_the_largest(max_context: int) -> None:
    config = EngineConfig(max_running=200, step_tokens=9000)
    largest = round_room(largest_work(config, max_context, 1000, None), MAX_PAGES)
    assert largest is not None
    assert largest.prefill is not None
    random = Random(1)
    for _ in range(300):
        decodes = random.randrange(201)
        left = random.randrange(1, 9001 - decodes)
        prompts = []
        while left:
            prompts.append(random.randrange(1, min(left, max_context) + 1))
            left -= prompts[-1]
        room = round_room(work(decodes, prompts), MAX_PAGES)
        if room is not None:
            assert room.decode_rows <= largest.decode_rows
            assert room.prefill_rows <= largest.prefill_rows


@pytest.mark.parametrize("costs", list(shipped_costs()), ids=lambda costs: costs.hardware)
@pytest.mark.parametrize("running", [1, 20, 256, 512])
def test_what_is_recorded_ahead_can_all_be_kept(costs: QuadrantCosts, running: int) -> None:
    assert len(usual_keys(costs, EngineConfig(max_running=running).on("cuda"))) < _MOST_GRAPHS


@pytest.mark.parametrize("costs", list(shipped_costs()), ids=lambda costs: costs.hardware)
@pytest.mark.parametrize(
    ("fewest", "most", "shortest", "longest", "prompts"),
    [
        (13, 16, 64, 320, (0, 512, 1024)),
        (13, 16, 300, 900, (0, 512, 1024)),
        (17, 60, 64, 2000, (512, 1024, 2048)),
        (65, 120, 300, 1500, (512, 1024, 2048)),
        (130, 256, 300, 1500, (512, 1024, 2048)),
        (300, 512, 300, 1500, (512, 1024, 2048)),
        (90, 96, 900, 1300, (0,)),
    ],
)
def test_usual_graphs_serve_contexts_of_other_lengths(
    costs: QuadrantCosts,
    fewest: int,
    most: int,
    shortest: int,
    longest: int,
    prompts: tuple[int, ...],
) -> None:
    """How many tasks decode attention is cut into depends on them."""
    usual = usual_keys(costs, EngineConfig(max_running=512).on("cuda"))
    random = Random(0)
    for _ in range(30):
        decodes, page = [], 0
        for slot in range(random.randint(fewest, most)):
            length = random.randint(shortest, longest)
            pages = -(-length // PAGE_TOKENS)
            decodes.append(Span(length - 1, 1, range(page, page + pages), slot))
            page += pages
        rows = random.choice(prompts)
        prompt = [Span(0, rows, range(page, page + 32))] * (rows > 0)
        needed = key_of(CodedWork(decodes, prompt, planner(costs)))
        assert any(one.serves(needed, SHAPE.kv_heads) for one in usual)


def usual_keys(costs: QuadrantCosts, config: EngineConfig) -> set[_Key]:
    """Of the graphs that are recorded before the first request, and while there is none."""
    steps = [
        *((decodes, []) for decodes in usual_decodes(config.running, 1 << 20)),
        *usual_steps(config, MAX_PAGES * PAGE_TOKENS, 1 << 20),
    ]
    return {key_of(CodedWork(*step, planner(costs))) for step in steps}


def planner(costs: QuadrantCosts) -> DecodePlanner:
    return DecodePlanner(SHAPE, costs.decode_attention)


def key_of(work: CodedWork) -> _Key:
    room = round_room(work, MAX_PAGES)
    assert room is not None
    return _Key(room=room, adjustment=Adjustment.NONE, kept=False)


def test_what_a_graph_must_not_hold_too_much_of() -> None:
    """Rows that are sampled, pieces that are merged apart, page tables that are copied whole."""

    def key(*, tasks: int = 32, pages: int = 16384, merged: int = 8, chunks: int = 16) -> _Key:
        plan = PlanCapacity.of_tasks(
            SHAPE, rows=16, tasks=((16, tasks),), pages=pages, merged=merged
        )
        prefill = PrefillRoom(chunks=chunks, rows=2048, pages=MAX_PAGES)
        room = StepRoom(decode_rows=16, decode=plan, prefill=prefill)
        return _Key(room=room, adjustment=Adjustment.NONE, kept=False)

    needed = key()
    assert key(tasks=512).serves(needed, 4)
    assert key(chunks=64).serves(needed, 4)
    for more in ({"tasks": 2048}, {"pages": 262144}, {"merged": 64}, {"chunks": 256}):
        assert not key(**more).serves(needed, 4), more
    assert not needed.serves(key(tasks=128), 4)
    assert not needed.serves(key(chunks=32), 4)
    assert not needed.serves(dataclasses.replace(needed, kept=True), 4)
    assert dataclasses.replace(needed, kept=True).serves(needed, 4)
    assert key(tasks=128).size < key(tasks=512).size
