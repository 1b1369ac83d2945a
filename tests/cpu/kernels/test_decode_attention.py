"""Decode attention over 8-bit pages: the reference against float64, the kernels against it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fourfold.kernels.decode_attention import (
    DecodeSequences,
    DecodeShape,
    PlanBuffers,
    PlanCapacity,
    candidate_plans,
    merge_and_quantize,
    paged_int8_attention_decode,
    paged_int8_attention_decode_reference,
    paged_int8_attention_decode_unmerged,
    triton_merge,
)
from fourfold.kernels.decode_attention.choose import choose_merge
from fourfold.kernels.pages import (
    PAGE_TOKENS,
    VALUE_ORDER,
    PageCodes,
    PageLayout,
    SealJobs,
    seal_pages,
)
from fourfold.kernels.rows import quantize_rows
from fourfold.quadrants.costs import shipped_costs

CPU = torch.device("cpu")
# Sharing costs nothing, so that plans share wherever they can.
COST = dataclasses.replace(next(shipped_costs()).decode_attention, partial=0.0)


class Step:
    """Sequences of random keys and values, sealed by the kernel that does so."""

    def __init__(
        self,
        lengths: list[int],
        shape: DecodeShape,
        sharing: dict[int, tuple[int, int]] | None = None,
        dtype: torch.dtype = torch.float16,
        codes: PageCodes = PageCodes.INT8,
    ) -> None:
        """`sharing[b] = (a, n)`: sequence b begins with the first n pages of sequence a."""
        generator = torch.Generator().manual_seed(len(lengths) + shape.rows)
        G, C = shape.kv_heads, shape.head_width
        self.shape, self.layout = shape, PageLayout(kv_heads=G, head_width=C, codes=codes)
        lengths_B = np.array(lengths, np.int64)
        sealed_B = (lengths_B - 1) // PAGE_TOKENS
        count = int(sealed_B.sum()) + 2
        # Outliers: one channel of the keys, one token of the values, one channel of the queries.
        k = torch.randn(count * PAGE_TOKENS, G, C, generator=generator)
        k[..., 5] *= 4
        v = torch.randn(count * PAGE_TOKENS, G, C, generator=generator)
        v[7] *= 4
        self.records = torch.full((count, self.layout.record_bytes), 127, dtype=torch.uint8)
        order = torch.randperm(count, generator=generator)
        places = torch.arange(count) * PAGE_TOKENS
        seal_pages(self.records, self.layout, k.to(dtype), v.to(dtype), places, order)
        given = iter(order.tolist())
        tables: list[list[int]] = []
        for b, sealed in enumerate(sealed_B.tolist()):
            parent, n = (sharing or {}).get(b, (0, 0))
            table = tables[parent][:n] if n else []
            tables.append(table + [next(given) for _ in range(sealed - n)])
        slots = len(lengths) + 1
        self.open_k = torch.randn(slots * PAGE_TOKENS, G, C, generator=generator).to(dtype)
        self.open_v = torch.randn(slots * PAGE_TOKENS, G, C, generator=generator).to(dtype)
        q_RHC = torch.randn(len(lengths) * shape.rows, shape.heads, C, generator=generator)
        q_RHC[..., 3] *= 8
        self.q_RHC = q_RHC.to(dtype)
        self.sequences = DecodeSequences(
            lengths_B,
            [np.array(table, np.int32) for table in tables],
            np.arange(1, slots, dtype=np.int64),
        )

    def reference(self) -> Tensor:
        return paged_int8_attention_decode_reference(
            self.q_RHC, self.records, self.open_k, self.open_v, self.layout, self.sequences
        )

    def exact(self) -> Tensor:
        """Float64 attention over what the pages' codes stand for."""
        views = self.layout.views(self.records)
        inverse = torch.tensor(VALUE_ORDER).argsort()
        k_PGNC = views.keys.double() * views.scales[:, 0, :, None, None]
        v_PGCN = views.values.double()[..., inverse] * views.scales[:, 1, :, None, None]
        out_RHC = torch.empty_like(self.q_RHC, dtype=torch.float64)
        rows, shared = self.shape.rows, self.shape.shared
        for b, length in enumerate(self.sequences.lengths_B.tolist()):
            pages = torch.from_numpy(self.sequences.pages[b]).long()
            start = int(self.sequences.open_slots_B[b]) * PAGE_TOKENS
            k_GTC = k_PGNC[pages].transpose(0, 1).flatten(1, 2)
            v_GTC = v_PGCN[pages].permute(1, 0, 3, 2).flatten(1, 2)
            for i in range(rows):
                seen = length - rows + i + 1 - PAGE_TOKENS * len(pages)
                open_k, open_v = (
                    x[start : start + seen].double().transpose(0, 1)
                    for x in (self.open_k, self.open_v)
                )
                k_HTC, v_HTC = (
                    torch.cat(pair, 1).repeat_interleave(shared, 0)
                    for pair in ((k_GTC, open_k), (v_GTC, open_v))
                )
                q_HC = self.q_RHC[b * rows + i].double()
                x_HT = (k_HTC @ q_HC[..., None])[..., 0] * self.shape.head_width**-0.5
                out_RHC[b * rows + i] = (x_HT.softmax(-1)[:, None] @ v_HTC)[:, 0]
        return out_RHC


def error(out: Tensor, wanted: Tensor) -> float:
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 8, 64), (8, 2, 128), (16, 2, 64)])
@pytest.mark.parametrize("rows", [1, 4])
def test_reference_against_float64(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, rows: int
) -> None:
    shape = DecodeShape(heads=heads, kv_heads=kv_heads, head_width=width, rows=rows)
    step = Step([rows, 64, 64 + rows, 700, 2048], shape, dtype=dtype)
    out, wanted = step.reference(), step.exact()
    assert out.dtype == dtype
    assert error(out, wanted) < 0.02
    # Without a sealed page nothing is 8-bit.
    assert error(out[: 2 * rows], wanted[: 2 * rows]) < 0.005


def test_fp8_reference_against_float64() -> None:
    shape = DecodeShape(heads=8, kv_heads=2, head_width=64, rows=2)
    step = Step([66, 700, 2048], shape, codes=PageCodes.FP8)
    assert error(step.reference(), step.exact()) < 0.06


def test_a_long_tail_survives_a_sink() -> None:
    """Weights are rounded relative to their own page: one token that takes half of the weight does
    not round the thousands that share the other half to nothing."""
    shape = DecodeShape(heads=1, kv_heads=1, head_width=64)
    step = Step([64 * 64 + 1], shape)
    tokens = torch.zeros(65 * PAGE_TOKENS, 1, 64, dtype=torch.float16)
    values = torch.ones_like(tokens)
    tokens[0], values[0] = 1.0, -1.0
    step.q_RHC = torch.full_like(step.q_RHC, math.log(4096) / 64**0.5)
    step.open_k.zero_()
    step.open_v.fill_(1.0)
    at = torch.arange(64)
    pages = torch.from_numpy(step.sequences.pages[0]).long()
    seal_pages(step.records, step.layout, tokens, values, at * PAGE_TOKENS, pages)
    out = step.reference()
    assert step.exact().abs().max() < 0.02  # half and half
    assert out.abs().max() < 0.05


CASES = {
    "open page of one token": ([1, 65], DecodeShape(heads=8, kv_heads=2, head_width=64), {}),
    "exactly full pages": ([64, 128], DecodeShape(heads=8, kv_heads=2, head_width=64), {}),
    "one sequence": ([300], DecodeShape(heads=4, kv_heads=1, head_width=128), {}),
    "one head a KV head": ([130], DecodeShape(heads=2, kv_heads=2, head_width=64), {}),
    "several rows": ([67, 200], DecodeShape(heads=10, kv_heads=2, head_width=64, rows=3), {}),
    "pieces in two turns": ([64 * 20 + 5], DecodeShape(heads=2, kv_heads=1, head_width=64), {}),
    "pieces merged apart": ([64 * 33 + 5, 70], DecodeShape(heads=2, kv_heads=1, head_width=64), {}),
    "more rows than a tile": ([90], DecodeShape(heads=10, kv_heads=1, head_width=64, rows=7), {}),
    "groups in groups": (
        [400, 401, 450, 70],
        DecodeShape(heads=8, kv_heads=1, head_width=64),
        {1: (0, 4), 2: (1, 6)},
    ),
    "groups, several rows": (
        [140, 135, 70],
        DecodeShape(heads=8, kv_heads=1, head_width=64, rows=2),
        {1: (0, 2)},
    ),
}


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_kernels_against_the_reference(
    case: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlanCapacity, "are_few", lambda capacity, kv_heads: few)
    lengths, shape, sharing = CASES[case]
    step = Step(lengths, shape, sharing)
    wanted = step.reference()
    plans = list(candidate_plans(step.sequences, shape, COST))
    finest = [[p for p in plans if bool(p.choice.sharing) is s][:1] for s in (False, True)]
    for plan in [*finest[0], *finest[1], plans[-1]]:
        buffers = PlanBuffers.holding(plan, CPU)
        buffers.partial_o.fill_(math.nan)
        buffers.partial_lse.fill_(math.nan)
        out = paged_int8_attention_decode(
            step.q_RHC, step.records, step.open_k, step.open_v, step.layout, buffers
        )
        assert error(out, wanted) < 1e-3, plan.choice


def test_fp8_kernels_against_the_reference() -> None:
    """Loosely: the interpreter cuts off where a GPU rounds to e4m3."""
    step = Step([65, 200], DecodeShape(heads=8, kv_heads=2, head_width=64), codes=PageCodes.FP8)
    plan = next(candidate_plans(step.sequences, step.shape, COST))
    buffers = PlanBuffers.holding(plan, CPU)
    out = paged_int8_attention_decode(
        step.q_RHC, step.records, step.open_k, step.open_v, step.layout, buffers
    )
    assert error(out, step.reference()) < 0.12


def test_the_finest_plan_shares_what_it_can() -> None:
    lengths, shape, sharing = CASES["groups in groups"]
    step = Step(lengths, shape, sharing)
    plans = [p for p in candidate_plans(step.sequences, shape, COST) if p.choice.sharing]
    assert all({tile for tile, _ in plan.tiles} == {16, 64} for plan in plans)
    assert plans


@pytest.mark.parametrize(
    "case",
    [
        "several rows",
        "groups in groups",
        "exactly full pages",
        "pieces in two turns",
        "pieces merged apart",
    ],
)
def test_rows_are_merged_on_their_way_to_8_bits(case: str) -> None:
    """With rows beyond the plan's, as in a step that also prefills, and padded channels."""
    lengths, shape, sharing = CASES[case]
    step = Step(lengths, shape, sharing)
    further = torch.randn(3, shape.heads, shape.head_width).half()
    plans = list(candidate_plans(step.sequences, shape, COST))
    width = shape.heads * shape.head_width + 128
    for plan in (plans[0], plans[-1]):
        buffers = PlanBuffers.holding(plan, CPU)
        arguments = (step.q_RHC, step.records, step.open_k, step.open_v, step.layout, buffers)
        merged = torch.cat((paged_int8_attention_decode(*arguments), further)).flatten(1)
        wanted = quantize_rows(merged, torch.int8, width)
        unmerged = paged_int8_attention_decode_unmerged(*arguments)
        ours = merge_and_quantize(torch.cat((unmerged, further)), buffers, torch.int8, width)
        torch.testing.assert_close(ours.scale_T, wanted.scale_T, rtol=2e-3, atol=0)
        difference = ours.codes_TW.float() - wanted.codes_TW.float()
        # A merged value may be rounded the other way, and then its code.
        assert (difference.abs() <= 1).all()
        assert (difference != 0).float().mean() < 0.1
        assert not difference[-3:].any()


@pytest.mark.parametrize("jobs", [0, 1, 3])
def test_pages_are_sealed_in_the_launch_that_codes_the_rows(
    jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = choose_merge(4, 8, merges=True)._replace(sealing=5)
    monkeypatch.setattr(triton_merge, "choose_merge", lambda rows, heads, merges: build)
    shape = DecodeShape(heads=8, kv_heads=2, head_width=64)
    step = Step([64, 200, 128, 63], shape)
    plan = PlanBuffers.holding(next(candidate_plans(step.sequences, shape, COST)), CPU)
    first_row_J = torch.tensor([128, 64, 192, 0], dtype=torch.int32)
    page_J = torch.tensor([3, 0, 1, -1], dtype=torch.int32)
    page_J[jobs:] = -1
    records = [torch.full((5, step.layout.record_bytes), 77, dtype=torch.uint8) for _ in range(2)]
    ours, theirs = (
        SealJobs(r, step.layout, step.open_k, step.open_v, first_row_J, page_J) for r in records
    )
    arguments = (step.q_RHC, step.records, step.open_k, step.open_v, step.layout, plan)
    out = paged_int8_attention_decode_unmerged(*arguments)
    alone = merge_and_quantize(out, plan, torch.int8, 512)
    both = merge_and_quantize(out, plan, torch.int8, 512, ours)
    for part, expected in zip(both, alone, strict=True):
        assert torch.equal(part, expected)
    seal_pages(*theirs)
    assert torch.equal(*records)


def test_rows_without_a_plan_are_coded_as_they_are() -> None:
    out_THC = torch.randn(3, 4, 32).bfloat16()
    ours = merge_and_quantize(out_THC, None, torch.int8, 256)
    for part, wanted in zip(ours, quantize_rows(out_THC.flatten(1), torch.int8, 256), strict=True):
        assert torch.equal(part, wanted)


def test_a_merge_reads_less_at_once_where_heads_are_many() -> None:
    """Sums of 32 heads and 16 partials are what registers hold."""
    for rows in (1, 64, 256):
        few = choose_merge(rows, 32, merges=True)
        for heads in (48, 64, 96, 128):
            many = choose_merge(rows, heads, merges=True)
            assert many.partials >= 1
            assert many.partials * (1 << (heads - 1).bit_length()) <= few.partials * 32
            assert many.registers is None
