"""Decode attention over 8-bit pages on a GPU: every plan against the reference, and replays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fourfold.kernels.decode_attention import (
    DecodeShape,
    PlanBuffers,
    PlanCapacity,
    candidate_plans,
    empty_partials,
    merge_and_quantize,
    paged_int8_attention_decode,
    paged_int8_attention_decode_unmerged,
    plan_decode,
    search,
)
from fourfold.kernels.decode_attention.cutting import Runs
from fourfold.kernels.decode_attention.plan import TILES
from fourfold.kernels.pages import PageCodes, SealJobs, seal_pages
from fourfold.kernels.rows import quantize_rows
from tests.cpu.kernels.test_decode_attention import COST, Step, error

GPU = torch.device("cuda:0")


def attend(step: Step, buffers: PlanBuffers) -> torch.Tensor:
    """Beside partial results and open tokens that are no numbers, unless they are there."""
    for b, slot in enumerate(step.sequences.open_slots_B.tolist()):
        open_tokens = int(step.sequences.lengths_B[b]) - 64 * int(step.sequences.sealed_B[b])
        step.open_k[slot * 64 + open_tokens : (slot + 1) * 64] = math.nan
        step.open_v[slot * 64 + open_tokens : (slot + 1) * 64] = math.nan
    buffers.partial_o.fill_(math.nan)
    buffers.partial_lse.fill_(math.nan)
    q, records, open_k, open_v = (
        tensor.to(GPU) for tensor in (step.q_RHC, step.records, step.open_k, step.open_v)
    )
    return paged_int8_attention_decode(q, records, open_k, open_v, step.layout, buffers)


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


@pytest.mark.parametrize("codes", list(PageCodes))
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("shared", [1, 5, 8])
def test_wide_tiles(
    codes: PageCodes, rows: int, width: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a plan would take narrow ones for."""
    narrow = search.Step.runs

    def runs(*arguments: Any) -> Runs:
        made = narrow(*arguments)
        return made._replace(tile=np.full_like(made.tile, TILES[-1]))

    monkeypatch.setattr(search.Step, "runs", runs)
    shape = DecodeShape(heads=2 * shared, kv_heads=2, head_width=width, rows=rows)
    sharing = {2: (1, 20), 3: (1, 20), 4: (3, 30)}
    step = Step([rows, 2000, 2600, 2650, 2250, 64, 65 + rows], shape, sharing, codes=codes)
    wanted = step.reference()
    plans = list(candidate_plans(step.sequences, shape, COST))
    # One sequence fills a tile of 64 rows, or several share one.
    assert {bool(p.choice.sharing) for p in plans} == {False, shared * rows < TILES[-1]}
    for plan in plans:
        assert [tile for tile, _ in plan.tiles] == [TILES[-1]]
        buffers = PlanBuffers.holding(plan, GPU)
        out = attend(step, buffers)
        assert error(out.cpu(), wanted) < (2e-3 if codes is PageCodes.INT8 else 0.02), plan.choice
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
        rows=6, tasks=((64, 1000), (16, 3000)), pages=200, merges=500, partials=20000, merged=64
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
            buffers.partial_lse.fill_(math.nan)
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


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("beside", [0, 3, 200])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 4, 128), (9, 3, 64)])
def test_rows_are_merged_on_their_way_to_8_bits(
    codes: torch.dtype, beside: int, heads: int, kv_heads: int, width: int
) -> None:
    """Whether rows are whole, in few pieces or in many, with pages sealed in the same launch."""
    shape = DecodeShape(heads=heads, kv_heads=kv_heads, head_width=width)
    step = Step([1, 2000, 2600, 3000, 2650, 64, 66], shape, {3: (1, 20)}, torch.bfloat16)
    further = torch.randn(beside, heads, width, device=GPU, dtype=torch.bfloat16)
    channels = -(-heads * width // 128) * 128
    tensors = [t.to(GPU) for t in (step.q_RHC, step.records, step.open_k, step.open_v)]
    jobs = torch.tensor([[0, 128, 64], [1, 0, -1]], dtype=torch.int32, device=GPU)
    for plan in candidate_plans(step.sequences, shape, COST):
        buffers = PlanBuffers.holding(plan, GPU)
        arguments = (*tensors, step.layout, buffers)
        merged = torch.cat((paged_int8_attention_decode(*arguments), further)).flatten(1)
        wanted = quantize_rows(merged, codes, channels)
        sealed = [torch.zeros_like(tensors[1]) for _ in range(2)]
        ours_jobs, their_jobs = (
            SealJobs(records, step.layout, *tensors[2:], *jobs) for records in sealed
        )
        results = []
        for _ in range(2):
            unmerged = paged_int8_attention_decode_unmerged(*arguments)
            rows = torch.cat((unmerged, further))
            results.append(merge_and_quantize(rows, buffers, codes, channels, ours_jobs))
        ours = results[0]
        for part, again in zip(ours, results[1], strict=True):
            assert torch.equal(part.view(torch.uint8), again.view(torch.uint8))
        seal_pages(*their_jobs)
        assert torch.equal(*sealed)
        torch.testing.assert_close(ours.scale_T, wanted.scale_T, rtol=1e-2, atol=0)
        difference = (ours.codes_TW.float() - wanted.codes_TW.float()).abs()
        assert (difference > (2 if codes == torch.int8 else 33)).float().mean() < 1e-3
        assert not difference[len(unmerged) :].any()
        assert not ours.codes_TW[:, heads * width :].float().any()


def test_a_layer_in_a_graph_follows_plans_of_a_covering_capacity() -> None:
    """Words and partials shared by two capacities, rows padded, every launch a dependent one."""
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    steps = [
        Step(lengths, shape, sharing, torch.bfloat16)
        for lengths, sharing in (
            ([70, 300], {}),
            ([2000, 2600, 3000, 64], {1: (0, 20), 2: (0, 25)}),
        )
    ]
    plans = [plan_decode(step.sequences, shape, COST) for step in steps]
    capacities = [PlanCapacity.covering(plan, 6) for plan in plans]
    size = max(map(PlanBuffers.words_needed, capacities))
    words = torch.zeros(size, dtype=torch.int32, device=GPU)
    partials = empty_partials(shape, max(capacities, key=lambda c: c.partials), GPU)
    for step, plan, capacity in zip(steps, plans, capacities, strict=True):
        part = words[: PlanBuffers.words_needed(capacity)]
        buffers = PlanBuffers(shape, capacity, GPU, words=part, partials=partials)
        q = torch.zeros(6, 32, 128, dtype=torch.bfloat16, device=GPU)
        arguments = (q, *(t.to(GPU) for t in vars_of(step)), step.layout, buffers)
        buffers.load(plan)
        merge_and_quantize(
            paged_int8_attention_decode_unmerged(*arguments), buffers, torch.int8, 4096
        )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = paged_int8_attention_decode_unmerged(*arguments)
            codes, scale = merge_and_quantize(out, buffers, torch.int8, 4096)
        count = len(step.q_RHC)
        q[:count] = step.q_RHC.to(GPU)
        for sharing in (False, True):
            for candidate in candidate_plans(step.sequences, shape, COST):
                if bool(candidate.choice.sharing) is sharing and buffers.fits(candidate):
                    buffers.load(candidate)
                    buffers.partial_o.fill_(math.nan)
                    graph.replay()
                    rows = (codes.float() * scale[:, None]).view(6, 32, 128)[:count]
                    assert error(rows.cpu(), step.reference()) < 0.02, candidate.choice
