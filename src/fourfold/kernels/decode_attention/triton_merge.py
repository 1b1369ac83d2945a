"""Merging the partial results of decode attention, in Triton: alone, or on the way to 8-bit rows.

Where rows are in few pieces, one program merges all heads of a row and codes it for the product
that follows. Every thread keeps its channels of all partials to itself, so nothing is exchanged
before the row's largest magnitude is. Pages that the step filled are sealed by further programs of
that launch: they depend on nothing that it computes, and mostly there are none.

Shapes: R query rows, H query heads, G KV heads, C head width, B partials at once.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.decode_attention.buffers import FEW_PARTIALS, PlanBuffers
from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.pages.fill import SealJobs
from fourfold.kernels.pages.layout import PageCodes
from fourfold.kernels.pages.triton_pages import quantized_tile, seal_half
from fourfold.kernels.rows.reference import Rows, largest_code

_SEALING_PROGRAMS = 256
_FEW_ROWS = 132
_PADDING = tl.constexpr(128)


@triton.jit
def merge_kernel(out, partial_o, partial_ml, merge_starts, merge_rows, head_stride,
                 SHARED: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
                 EARLY: tl.constexpr):  # fmt: skip
    """Adds up the partials of one query row and head, in the order of the plan."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(merge_starts + row)
    end = tl.load(merge_starts + row + 1)
    stride = tl.load(head_stride).to(tl.int64)
    i_B = begin + tl.arange(0, B)
    at_B = tl.load(merge_rows + i_B, mask=i_B < end, other=0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if begin == end:
        return
    offset = (head // SHARED) * stride + head % SHARED
    c_C = tl.arange(0, C)
    top = -float("inf")
    total = 0.0
    o_C = tl.zeros((C,), tl.float32)
    for start in tl.range(begin, end, B):
        i_B = start + tl.arange(0, B)
        real_B = i_B < end
        at_B += offset
        top_B = tl.load(partial_ml + at_B * 2, mask=real_B, other=float("-inf"))
        l_B = tl.load(partial_ml + at_B * 2 + 1, mask=real_B, other=0.0)
        o_BC = tl.load(
            partial_o + at_B[:, None] * C + c_C[None, :], mask=real_B[:, None], other=0.0
        )
        at_B = tl.load(merge_rows + i_B + B, mask=i_B + B < end, other=0)
        new_top = tl.maximum(top, tl.max(top_B, 0))
        keep = tl.exp2(top - new_top)
        weight_B = tl.exp2(top_B - new_top) * l_B
        o_C = o_C * keep + tl.sum(o_BC.to(tl.float32) * weight_B[:, None], 0)
        total = total * keep + tl.sum(weight_B, 0)
        top = new_top
    heads = tl.num_programs(1)
    at_C = (row.to(tl.int64) * heads + head) * C + c_C
    tl.store(out + at_C, (o_C / total).to(out.dtype.element_ty))


@triton.jit
def _partial(partial_o, partial_ml, at_H, real_H, c_C, C: tl.constexpr):
    """Largest scores [H], sums of weights [H] and means of values [H, C] of partials."""
    top_H = tl.load(partial_ml + at_H * 2, mask=real_H, other=float("-inf"))
    l_H = tl.load(partial_ml + at_H * 2 + 1, mask=real_H, other=0.0)
    o_HC = tl.load(partial_o + at_H[:, None] * C + c_C[None, :], mask=real_H[:, None], other=0.0)
    return top_H, l_H, o_HC.to(tl.float32)


@triton.jit
def _listed(merge_rows, i, end):
    """The partials i..i + 3 of a list that ends at `end`."""
    return (
        tl.load(merge_rows + i, mask=i < end, other=0),
        tl.load(merge_rows + i + 1, mask=i + 1 < end, other=0),
        tl.load(merge_rows + i + 2, mask=i + 2 < end, other=0),
        tl.load(merge_rows + i + 3, mask=i + 3 < end, other=0),
    )


@triton.jit
def _merge_four(partial_o, partial_ml, at_0, at_1, at_2, at_3, left, offset_H, real_H, c_C,
                o_HC, l_H, top_H, C: tl.constexpr):  # fmt: skip
    """The state (o, l, top) of all heads of a row grows by four partials, or the `left` first."""
    t0_H, l0_H, o0_HC = _partial(
        partial_o, partial_ml, at_0 + offset_H, real_H & (left > 0), c_C, C
    )
    t1_H, l1_H, o1_HC = _partial(
        partial_o, partial_ml, at_1 + offset_H, real_H & (left > 1), c_C, C
    )
    t2_H, l2_H, o2_HC = _partial(
        partial_o, partial_ml, at_2 + offset_H, real_H & (left > 2), c_C, C
    )
    t3_H, l3_H, o3_HC = _partial(
        partial_o, partial_ml, at_3 + offset_H, real_H & (left > 3), c_C, C
    )
    new_top_H = tl.maximum(tl.maximum(t0_H, t1_H), tl.maximum(t2_H, t3_H))
    new_top_H = tl.maximum(top_H, new_top_H)
    # Only heads that are not there have seen nothing so far.
    new_top_H = tl.where(new_top_H == float("-inf"), 0.0, new_top_H)
    keep_H = tl.exp2(top_H - new_top_H)
    w0_H = tl.exp2(t0_H - new_top_H) * l0_H
    w1_H = tl.exp2(t1_H - new_top_H) * l1_H
    w2_H = tl.exp2(t2_H - new_top_H) * l2_H
    w3_H = tl.exp2(t3_H - new_top_H) * l3_H
    o_HC = o_HC * keep_H[:, None] + o0_HC * w0_H[:, None] + o1_HC * w1_H[:, None]
    o_HC = o_HC + o2_HC * w2_H[:, None] + o3_HC * w3_H[:, None]
    return o_HC, l_H * keep_H + w0_H + w1_H + w2_H + w3_H, new_top_H


@triton.jit
def _merged_row(out, partial_o, partial_ml, merge_rows, begin, end, stride, at_HC, real_H,
                H: tl.constexpr, SHARED: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
                EARLY: tl.constexpr):  # fmt: skip
    """A row of `out`, or the sum of its partials, [HEADS, C] in the dtype of `out`."""
    # The lists belong to the plan, which has been there since before the chain of kernels.
    a0, a1, a2, a3 = _listed(merge_rows, begin, end)
    b0, b1, b2, b3 = _listed(merge_rows, begin + 4, end)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if begin == end:
        merged_HC = tl.load(out + at_HC, mask=real_H[:, None], other=0.0)
    else:
        head_H, c_C = tl.arange(0, HEADS), tl.arange(0, C)
        offset_H = (head_H // SHARED) * stride + head_H % SHARED
        o_HC = tl.zeros((HEADS, C), tl.float32)
        l_H = tl.zeros((HEADS,), tl.float32)
        top_H = tl.full((HEADS,), float("-inf"), tl.float32)
        for i in tl.range(begin, end, 8):
            o_HC, l_H, top_H = _merge_four(
                partial_o, partial_ml, a0, a1, a2, a3, end - i, offset_H, real_H, c_C,
                o_HC, l_H, top_H, C,
            )  # fmt: skip
            o_HC, l_H, top_H = _merge_four(
                partial_o, partial_ml, b0, b1, b2, b3, end - i - 4, offset_H, real_H, c_C,
                o_HC, l_H, top_H, C,
            )  # fmt: skip
            a0, a1, a2, a3 = _listed(merge_rows, i + 8, end)
            b0, b1, b2, b3 = _listed(merge_rows, i + 12, end)
        l_H = tl.where(real_H, l_H, 1.0)
        merged_HC = (o_HC / l_H[:, None]).to(out.dtype.element_ty)
    return merged_HC


# Numbers of rows are of a step's room: one form is for all of them.
@triton.jit(
    do_not_specialize=["rows", "planned_rows", "jobs"],
    do_not_specialize_on_alignment=["first_row_ptr", "page_ptr"],
)
def merge_quantize_kernel(
    out, partial_o, partial_ml, merge_starts, merge_rows, head_stride, codes_ptr, scale_ptr,
    rows, planned_rows, width,
    page_codes, page_scales, open_k, open_v, first_row_ptr, page_ptr, jobs, record_stride,
    H: tl.constexpr, SHARED: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
    MERGE: tl.constexpr, LARGEST: tl.constexpr, INT8: tl.constexpr, SEAL: tl.constexpr,
    G: tl.constexpr, PAGE_C: tl.constexpr, PAGE_LARGEST: tl.constexpr,
    PAGE_INT8: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row, or some of the halves of pages that are to be sealed. Eight partials are read at
    once; without `MERGE` there are none, only rows of `out`."""
    row = tl.program_id(0).to(tl.int64)
    if row < rows:
        head_H = tl.arange(0, HEADS)
        real_H = head_H < H
        at_HC = head_H[:, None] * C + tl.arange(0, C)[None, :]
        if MERGE:
            planned = row < planned_rows
            begin = tl.load(merge_starts + row, mask=planned, other=0)
            end = tl.load(merge_starts + row + 1, mask=planned, other=0)
            merged_HC = _merged_row(
                out + row * (H * C), partial_o, partial_ml, merge_rows, begin, end,
                tl.load(head_stride), at_HC, real_H, H, SHARED, C, HEADS, EARLY,
            )  # fmt: skip
        else:
            if EARLY:
                gdc_wait()
                gdc_launch_dependents()
            merged_HC = tl.load(out + row * (H * C) + at_HC, mask=real_H[:, None], other=0.0)
        codes_HC, scale = quantized_tile(merged_HC, LARGEST, INT8)
        tl.store(codes_ptr + row * width + at_HC, codes_HC, mask=real_H[:, None])
        tl.store(scale_ptr + row, scale)
        pad = H * C + tl.arange(0, _PADDING)
        while tl.min(pad, 0) < width:
            nothing = tl.zeros((_PADDING,), tl.float32).to(codes_ptr.dtype.element_ty)
            tl.store(codes_ptr + row * width + pad, nothing, mask=pad < width)
            pad += _PADDING
    elif SEAL:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        unit = tl.program_id(0) - rows
        step = tl.num_programs(0) - rows
        page = tl.load(page_ptr + unit // (2 * G), mask=unit < jobs * 2 * G, other=-1)
        while page >= 0:
            first = tl.load(first_row_ptr + unit // (2 * G)).to(tl.int64)
            seal_half(
                page_codes, page_scales, open_k, open_v, first, page.to(tl.int64),
                (unit // 2) % G, unit % 2 == 1, record_stride, G * PAGE_C, G * PAGE_C, G, PAGE_C,
                PAGE_LARGEST, PAGE_INT8,
            )  # fmt: skip
            unit += step
            page = tl.load(page_ptr + unit // (2 * G), mask=unit < jobs * 2 * G, other=-1)


def launch_merge(out_RHC: Tensor, plan: PlanBuffers) -> None:
    """Adds up the partials of every row that has any, in `out_RHC`."""
    rows, heads, width = out_RHC.shape
    early = overlaps_launches(out_RHC.device)
    at_once = 16 if plan.capacity.merged <= 16 else 64
    merge_kernel[(rows, heads)](
        out_RHC, plan.partial_o.view(out_RHC.dtype), plan.partial_ml, plan["merge_starts"],
        plan["merge_rows"], plan["header"], SHARED=plan.shape.shared, C=width, B=at_once,
        EARLY=early, num_warps=at_once // 16, launch_pdl=early,
    )  # fmt: skip


def launch_merge_quantize(
    out_RHC: Tensor,
    plan: PlanBuffers | None,
    dtype: torch.dtype,
    width: int,
    seals: SealJobs | None,
) -> Rows:
    """`merge_and_quantize` on checked arguments."""
    rows, heads, head_width = out_RHC.shape
    device = out_RHC.device
    coded = Rows(
        torch.empty(rows, width, dtype=dtype, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )
    if plan is not None and plan.capacity.merged > FEW_PARTIALS:
        # One program would be long about so many partials of all heads.
        launch_merge(out_RHC[: plan.capacity.rows], plan)
        plan = None
    if plan is not None and not plan.capacity.merges:
        plan = None
    few = rows <= _FEW_ROWS
    early = overlaps_launches(device)
    sealing, page_settings, programs = _sealing(seals, out_RHC)
    merge_quantize_kernel[(rows + programs,)](
        out_RHC, *_merging(plan, out_RHC), *coded, rows,
        0 if plan is None else plan.capacity.rows, width, *sealing,
        H=heads, SHARED=1 if plan is None else plan.shape.shared, C=head_width,
        HEADS=triton.next_power_of_2(heads), MERGE=plan is not None,
        LARGEST=largest_code(dtype), INT8=dtype == torch.int8, **page_settings,
        EARLY=early, num_warps=16 if few else 8, enable_fp_fusion=False, launch_pdl=early,
    )  # fmt: skip
    return coded


def _merging(plan: PlanBuffers | None, out_RHC: Tensor) -> tuple[Tensor, ...]:
    """What the kernel reads of a plan."""
    if plan is None:
        return (out_RHC,) * 5
    partial_o = plan.partial_o.view(out_RHC.dtype)
    parts = (plan[name] for name in ("merge_starts", "merge_rows", "header"))
    return (partial_o, plan.partial_ml, *parts)


def _sealing(
    seals: SealJobs | None, instead: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """What the kernel is handed for pages that are to be sealed, what it is compiled with, and how
    many programs share them."""
    if seals is None:
        none = {"SEAL": False, "G": 1, "PAGE_C": 1, "PAGE_LARGEST": 0.0, "PAGE_INT8": False}
        return (*(instead,) * 6, 0, 0), none, 0
    layout, jobs, records = seals.layout, seals.page_J.numel(), seals.records_PR
    arguments = (
        records.view(layout.codes.dtype), records.view(torch.float32), seals.k_SGC, seals.v_SGC,
        seals.first_row_J, seals.page_J, jobs, records.stride(0),
    )  # fmt: skip
    settings = {
        "SEAL": True,
        "G": layout.kv_heads,
        "PAGE_C": layout.head_width,
        "PAGE_LARGEST": layout.codes.largest,
        "PAGE_INT8": layout.codes is PageCodes.INT8,
    }
    return arguments, settings, min(jobs * layout.kv_heads * 2, _SEALING_PROGRAMS)
