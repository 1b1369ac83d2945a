"""What is compiled before the first request is what requests need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

import pytest

from fourfold.engine.config import EngineConfig
from fourfold.engine.graphs import round_room, usual_decode_rows
from fourfold.engine.warming import walked_rooms
from fourfold.kernels.decode_attention import DecodePlanner, DecodeShape
from fourfold.kernels.decode_attention.choose import (
    choose_build,
    choose_merge,
    merge_of_heads,
    most_at_once,
)
from fourfold.kernels.rope.choose import choose_tile as choose_heads
from fourfold.kernels.routing.choose import choose_choice, choose_logits, sorts_at_once
from fourfold.kernels.routing.groups import choose_tile as choose_grouped_tile
from fourfold.kernels.rows.choose import choose_tile as choose_rows
from fourfold.kernels.w4a8_gemm.choose import choose_dense, choose_grouped
from fourfold.quadrants.costs import shipped_costs
from fourfold.quadrants.kv_pages import PAGE_TOKENS, Span
from fourfold.quadrants.step import CodedWork, StepRoom

CONTEXT = 40_960
COSTS = {costs.hardware: costs.decode_attention for costs in shipped_costs()}


def forms(rooms: Iterable[StepRoom], kv_heads: int, heads: int = 32) -> set[tuple[object, ...]]:
    """What the kernels of decode attention are compiled for."""
    found: set[tuple[object, ...]] = set()
    for room in rooms:
        plan = room.decode
        if plan is None:
            merge = choose_merge(room.rows, heads, merges=False)
            found.add(("merge and quantize", False, False, merge._replace(sealing=0)))
            continue
        few = plan.are_few(kv_heads)
        for place, (tile, _) in enumerate(plan.tasks):
            build = choose_build(tile, 128, few=few, hopper=True)
            found.add(("decode", tile, place, build))
        at_once = plan.merged <= most_at_once(plan.rows)
        merges = at_once and plan.merges > 0
        merge = choose_merge(room.rows, heads, merges=merges)
        found.add(("merge and quantize", merges, True, merge._replace(sealing=0)))
        if not at_once:
            found.add(("merge", *merge_of_heads(plan.merged, plan.rows)))
    return found


def batch(random: Random) -> list[Span]:
    """Sequences of any length, alone or as siblings that share their first pages."""
    rows, page = random.choice((1, 2, 3, 5, 8, 20, 40, 100, 256)), 0
    spans: list[Span] = []
    while len(spans) < rows:
        siblings = min(random.choice((1, 1, 1, 2, 4, 8, 16, 64)), rows - len(spans))
        known = int(math.exp(random.uniform(0, math.log(512)))) if siblings > 1 else 0
        common = list(range(page, page + known))
        page += known
        for _ in range(siblings):
            own = int(math.exp(random.uniform(0, math.log(20_000))))
            pages = -(-own // PAGE_TOKENS)
            table = [*common, *range(page, page + pages)]
            page += pages
            spans.append(Span(known * PAGE_TOKENS + own - 1, 1, table, len(spans)))
    return spans


@pytest.mark.parametrize("hardware", COSTS)
@pytest.mark.parametrize("running", [8, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 4), (16, 2), (64, 8), (32, 32), (8, 1)])
def test_every_form_of_decode_attention_is_walked(
    hardware: str, running: int, heads: int, kv_heads: int
) -> None:
    shape = DecodeShape(heads=heads, kv_heads=kv_heads, head_width=128)

    def planner() -> DecodePlanner:
        return DecodePlanner(shape, COSTS[hardware])

    config = EngineConfig(max_running=running).on("cuda")
    walked = forms(walked_rooms(config, CONTEXT, shape, planner()), kv_heads)
    random = Random(kv_heads)
    rooms = []
    for _ in range(120):
        prompts = [Span(0, random.choice((64, 300, 2000)), range(32))] * (random.random() < 0.4)
        room = round_room(
            CodedWork(batch(random)[:running], prompts, planner()), CONTEXT // PAGE_TOKENS
        )
        assert room is not None
        rooms.append(room)
    needed = forms(rooms, kv_heads)
    assert len(needed) > 3
    assert needed <= walked


def forms_of_rows(rows: int, experts: int, width: int, *, hopper: bool) -> set[tuple[object, ...]]:
    """What the kernels of a layer are compiled for by the rows of a step."""
    # Triton has forms of its own for one and for multiples of 16.
    kind = 1 if rows == 1 else 16 if rows % 16 == 0 else None
    grouped = choose_grouped_tile(8 * rows, experts)
    found: set[tuple[object, ...]] = {
        ("rows", choose_rows(rows, width), kind),
        ("turned", choose_rows(rows, 768, turned=True), kind),
        ("heads", choose_heads(rows, 32, 4, values=True), kind),
        *(
            (
                "experts",
                choose_grouped(
                    grouped, 8 * rows, blocks, second=second, groups=True, hopper=hopper
                ),
            )
            for blocks, second in ((16, False), (6, True))
        ),
        ("projection", choose_dense(rows, 16, bits=8, outputs=5120, hopper=hopper)),
        ("output", choose_dense(rows, 32, bits=8, outputs=2048, hopper=hopper)),
    }
    splits: object = "few"
    if rows > 64:
        tile = choose_logits(rows, experts, width)
        splits = tile.splits
        found.add(("logits", tile._replace(splits=0)))
    if sorts_at_once(rows, experts):
        found.add(("choice and groups", 1 << (rows - 1).bit_length()))
    else:
        found.add(("choice", choose_choice(rows, experts), splits))
    return found


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize(("experts", "width"), [(128, 2048), (64, 2048), (8, 4096), (256, 5120)])
def test_every_form_that_rows_choose_is_walked(experts: int, width: int, hopper: bool) -> None:
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    config = EngineConfig().on("cuda")

    def needed(rows: Iterable[int]) -> set[tuple[object, ...]]:
        sets = (forms_of_rows(n, experts, width, hopper=hopper) for n in rows)
        return set().union(*sets)

    rooms = walked_rooms(config, CONTEXT, shape, DecodePlanner(shape, next(iter(COSTS.values()))))
    walked = {room.rows for room in rooms} | set(usual_decode_rows(config.running))
    possible = set()
    for decodes in (0, 1, 16, 17, 64, 65, 200, config.running):
        for prompt in range(PAGE_TOKENS, config.tokens + 1, PAGE_TOKENS):
            work = CodedWork(
                [Span(100, 1, [0, 1], s) for s in range(decodes)],
                [Span(0, prompt, range(prompt // PAGE_TOKENS))],
                None,
            )
            room = round_room(work, CONTEXT // PAGE_TOKENS)
            assert room is not None
            possible.add(room.rows)
    assert not needed(possible) - needed(walked)
