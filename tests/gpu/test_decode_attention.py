"""Decode attention over 8-bit pages on a GPU: every plan against the reference, and replays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fourfold.kernels.decode_attention import (
    DecodeShape,
    PlanBuffers,
    PlanCapacity,
    candidate_plans,
    paged_int8_attention_decode,
    plan_decode,
)
from fourfold.kernels.pages import PageCodes
from tests.cpu.kernels.test_decode_attention import COST, Step, error

GPU = torch.device("cuda:0")


def attend(step: Step, buffers: PlanBuffers) -> torch.Tensor:
    buffers.partial_o.fill_(math.nan)
    buffers.partial_ml.fill_(math.nan)
    tensors = (step.q_RHC, step.records, step.open_k, step.open_v)
    return paged_int8_attention_decode(*(t.to(GPU) for t in tensors), step.layout, buffers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(32, 4, 128), (32, 32, 128), (16, 4, 64), (20, 4, 64)]
)
def test_every_plan(dtype: torch.dtype, rows: int, heads: int, kv_heads: int, width: int) -> None:
    shape = DecodeShape(heads=heads, kv_heads=kv_heads, head_width=width, rows=rows)
    sharing = {2: (1, 20), 3: (1, 30), 4: (3, 40)}
    step = Step([rows, 2000, 2600, 3000, 2650, 64, 65 + rows], shape, sharing, dtype)
    wanted = step.reference()
    for plan in candidate_plans(step.sequences, shape, COST):
        buffers = PlanBuffers.holding(plan, GPU)
        out = attend(step, buffers)
        assert error(out.cpu(), wanted) < (1e-3 if dtype == torch.float16 else 6e-3), plan.choice
        assert torch.equal(out, attend(step, buffers))


def test_fp8_pages() -> None:
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    step = Step([1, 2000, 2600, 65], shape, {2: (1, 30)}, torch.bfloat16, PageCodes.FP8)
    wanted = step.reference()
    for plan in candidate_plans(step.sequences, shape, COST):
        assert error(attend(step, PlanBuffers.holding(plan, GPU)).cpu(), wanted) < 0.02


def test_a_graph_follows_the_plan_that_is_loaded() -> None:
    """Captured with one plan, replayed with others: shorter, longer, with and without sharing."""
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    steps = [
        Step([2000, 2600, 3000, 64], shape, sharing, torch.bfloat16)
        for sharing in ({}, {1: (0, 20), 2: (0, 25)})
    ]
    capacity = PlanCapacity(
        rows=6, tasks=((64, 1000), (16, 3000)), pages=200, merges=500, partials=20000
    )
    buffers = PlanBuffers(shape, capacity, GPU)
    q, records, open_k, open_v = (t.to(GPU).clone() for t in (steps[0].q_RHC, *vars_of(steps[0])))
    buffers.load(plan_decode(steps[0].sequences, shape, COST))
    arguments = (q, records, open_k, open_v, steps[0].layout, buffers)
    paged_int8_attention_decode(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_int8_attention_decode(*arguments)
    for step in steps:
        for to, tensor in zip(
            (q, records, open_k, open_v), (step.q_RHC, *vars_of(step)), strict=True
        ):
            to[: len(tensor)].copy_(tensor)
        for plan in candidate_plans(step.sequences, shape, COST):
            buffers.load(plan)
            buffers.partial_o.fill_(math.nan)
            buffers.partial_ml.fill_(math.nan)
            out.fill_(math.nan)
            graph.replay()
            assert error(out.cpu(), step.reference()) < 6e-3, plan.choice


def vars_of(step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return step.records, step.open_k, step.open_v


def test_rounding_does_not_add_up_over_a_long_context() -> None:
    shape = DecodeShape(heads=8, kv_heads=1, head_width=128)
    step = Step([128 * 1024 + 1], shape, dtype=torch.bfloat16)
    plan = plan_decode(step.sequences, shape, COST)
    out = attend(step, PlanBuffers.holding(plan, GPU)).cpu()
    short = Step([2 * 1024 + 1], shape, dtype=torch.bfloat16)
    assert error(out, step.exact()) < 2 * error(short.reference(), short.exact()) + 0.01


def test_planning_is_off_the_critical_path() -> None:
    """`load` waits for nothing: a long kernel before it is still running when it returns."""
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    step = Step([2000, 2600], shape)
    plan = plan_decode(step.sequences, shape, COST)
    buffers = PlanBuffers.holding(plan, GPU)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e9))
    done = torch.cuda.Event()
    done.record()
    buffers.load(plan)
    assert not done.query()
    torch.cuda.synchronize()
    assert np.array_equal(buffers["pages"].cpu().numpy(), plan.pages)
