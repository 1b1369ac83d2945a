"""What is compiled before the first request is what requests need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

import pytest

from fourfold.engine.config import EngineConfig
from fourfold.engine.graphs import round_room
from fourfold.engine.warming import walked_rooms
from fourfold.kernels.decode_attention import DecodePlanner, DecodeShape
from fourfold.kernels.decode_attention.buffers import FEW_PARTIALS
from fourfold.kernels.decode_attention.triton_decode import _FEW_PROGRAMS
from fourfold.kernels.decode_attention.triton_merge import _FEW_ROWS
from fourfold.quadrants.costs import shipped_costs
from fourfold.quadrants.kv_pages import PAGE_TOKENS, Span
from fourfold.quadrants.step import CodedWork, StepRoom

CONTEXT = 40_960
COSTS = {costs.hardware: costs.decode_attention for costs in shipped_costs()}


def forms(rooms: Iterable[StepRoom], kv_heads: int) -> set[tuple[object, ...]]:
    """What the kernels of decode attention are compiled for."""
    found: set[tuple[object, ...]] = set()
    for room in rooms:
        few_rows = room.rows <= _FEW_ROWS
        plan = room.decode
        if plan is None:
            found.add(("merge and quantize", False, False, few_rows))
            continue
        for place, (tile, tasks) in enumerate(plan.tasks):
            found.add(("decode", tile, place, tasks * kv_heads <= _FEW_PROGRAMS))
        at_once = plan.merged <= FEW_PARTIALS
        found.add(("merge and quantize", at_once, True, few_rows))
        if not at_once:
            found.add(("merge",))
    return found


def batch(random: Random) -> list[Span]:
    """Sequences of any length, alone or as siblings that share their first pages."""
    rows, spans, page = random.choice((1, 2, 3, 5, 8, 20, 40, 100, 256)), [], 0
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
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 4), (16, 2), (64, 8), (32, 32), (8, 1)])
def test_every_form_of_decode_attention_is_walked(hardware: str, heads: int, kv_heads: int) -> None:
    shape = DecodeShape(heads=heads, kv_heads=kv_heads, head_width=128)

    def planner() -> DecodePlanner:
        return DecodePlanner(shape, COSTS[hardware])

    config = EngineConfig().on("cuda")
    walked = forms(walked_rooms(config, CONTEXT, shape, planner()), kv_heads)
    random = Random(kv_heads)
    rooms = []
    for _ in range(120):
        prompts = [Span(0, random.choice((64, 300, 2000)), range(32))] * (random.random() < 0.4)
        room = round_room(CodedWork(batch(random), prompts, planner()), CONTEXT // PAGE_TOKENS)
        assert room is not None
        rooms.append(room)
    needed = forms(rooms, kv_heads)
    assert len(needed) > 4
    assert needed <= walked
