"""Merging the partial results of decode attention, in Triton: alone, or on the way to 8-bit rows.

Where rows are in few pieces, one program merges all heads of a row and codes it for the product
that follows. Every thread keeps its channels of all partials to itself, so only their weights are
exchanged before the row's largest magnitude is. Pages that the step filled are sealed by further
programs of that launch: they depend on nothing that it computes, and mostly there are none.

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

from fourfold.kernels.decode_attention.buffers import PlanBuffers
from fourfold.kernels.decode_attention.choose import choose_merge, merge_of_heads, most_at_once
from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.pages.fill import SealJobs
from fourfold.kernels.pages.layout import PageCodes
from fourfold.kernels.pages.triton_pages import quantized_tile, seal_half
from fourfold.kernels.rows.reference import Rows, largest_code

_PADDING = tl.constexpr(128)


@triton.jit
def merge_kernel(out, partial_o, partial_lse, merge_starts, merge_rows, head_stride,
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
        lse_B = tl.load(partial_lse + at_B, mask=real_B, other=float("-inf"))
        o_BC = tl.load(
            partial_o + at_B[:, None] * C + c_C[None, :], mask=real_B[:, None], other=0.0
        )
        at_B = tl.load(merge_rows + i_B + B, mask=i_B + B < end, other=0)
        new_top = tl.maximum(top, tl.max(lse_B, 0))
        keep = tl.exp2(top - new_top)
        weight_B = tl.exp2(lse_B - new_top)
        o_C = o_C * keep + tl.sum(o_BC.to(tl.float32) * weight_B[:, None], 0)
        total = total * keep + tl.sum(weight_B, 0)
        top = new_top
    heads = tl.num_programs(1)
    at_C = (row.to(tl.int64) * heads + head) * C + c_C
    tl.store(out + at_C, (o_C / total).to(out.dtype.element_ty))


@triton.jit
def _merged_row(out, partial_o, partial_lse, merge_rows, begin, end, stride, at_HC, real_H,
                SHARED: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, B: tl.constexpr,
                EARLY: tl.constexpr):  # fmt: skip
    """A row of `out`, or the sum of its partials, [HEADS, C] in the dtype of `out`."""
    # The list belongs to the plan, which has been there since before the chain of kernels.
    i_B = begin + tl.arange(0, B)
    at_B = tl.load(merge_rows + i_B, mask=i_B < end, other=0)
    head_H = tl.arange(0, HEADS)
    offset_H = (head_H // SHARED) * stride + head_H % SHARED
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if begin == end:
        merged_HC = tl.load(out + at_HC, mask=real_H[:, None], other=0.0)
    else:
        c_C = tl.arange(0, C)
        o_HC = tl.zeros((HEADS, C), tl.float32)
        total_H = tl.zeros((HEADS,), tl.float32)
        top_H = tl.full((HEADS,), float("-inf"), tl.float32)
        for start in tl.range(begin, end, B):
            i_B = start + tl.arange(0, B)
            real_HB = real_H[:, None] & (i_B < end)[None, :]
            at_HB = offset_H[:, None] + at_B[None, :]
            lse_HB = tl.load(partial_lse + at_HB, mask=real_HB, other=float("-inf"))
            o_HBC = tl.load(
                partial_o + at_HB[:, :, None] * C + c_C[None, None, :],
                mask=real_HB[:, :, None], other=0.0,
            )  # fmt: skip
            at_B = tl.load(merge_rows + i_B + B, mask=i_B + B < end, other=0)
            new_top_H = tl.maximum(top_H, tl.max(lse_HB, 1))
            # Only heads that are not there have seen nothing so far.
            new_top_H = tl.where(real_H, new_top_H, 0.0)
            keep_H = tl.exp2(top_H - new_top_H)
            weight_HB = tl.exp2(lse_HB - new_top_H[:, None])
            o_HC = o_HC * keep_H[:, None]
            o_HC += tl.sum(o_HBC.to(tl.float32) * weight_HB[:, :, None], 1)
            total_H = total_H * keep_H + tl.sum(weight_HB, 1)
            top_H = new_top_H
        total_H = tl.where(real_H, total_H, 1.0)
        merged_HC = (o_HC / total_H[:, None]).to(out.dtype.element_ty)
    return merged_HC


# Numbers of rows are of a step's room: one form is for all of them.
@triton.jit(
    do_not_specialize=["rows", "planned_rows", "jobs"],
    do_not_specialize_on_alignment=["first_row_ptr", "page_ptr"],
)
def merge_quantize_kernel(
    out, partial_o, partial_lse, merge_starts, merge_rows, head_stride, codes_ptr, scale_ptr,
    rows, planned_rows, width,
    page_codes, page_scales, open_k, open_v, first_row_ptr, page_ptr, jobs, record_stride,
    H: tl.constexpr, SHARED: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
    B: tl.constexpr, MERGE: tl.constexpr, LARGEST: tl.constexpr, INT8: tl.constexpr,
    SEAL: tl.constexpr, G: tl.constexpr, PAGE_C: tl.constexpr, PAGE_LARGEST: tl.constexpr,
    PAGE_INT8: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row, or some of the halves of pages that are to be sealed. B partials are read at once;
    without `MERGE` there are none, only rows of `out`."""
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
                out + row * (H * C), partial_o, partial_lse, merge_rows, begin, end,
                tl.load(head_stride).to(tl.int64), at_HC, real_H, SHARED, C, HEADS, B, EARLY,
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
    at_once, warps = merge_of_heads(plan.capacity.merged, plan.capacity.rows)
    merge_kernel[(rows, heads)](
        out_RHC, plan.partial_o.view(out_RHC.dtype), plan.partial_lse, plan["merge_starts"],
        plan["merge_rows"], plan["header"], SHARED=plan.shape.shared, C=width, B=at_once,
        EARLY=early, num_warps=warps, launch_pdl=early,
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
    if plan is not None and plan.capacity.merged > most_at_once(plan.capacity.rows):
        # One program would be long about so many partials of all heads.
        launch_merge(out_RHC[: plan.capacity.rows], plan)
        plan = None
    if plan is not None and not plan.capacity.merges:
        plan = None
    build = choose_merge(rows, heads, merges=plan is not None)
    early = overlaps_launches(device)
    sealing, page_settings, programs = _sealing(seals, out_RHC, build.sealing)
    merge_quantize_kernel[(rows + programs,)](
        out_RHC, *_merging(plan, out_RHC), *coded, rows,
        0 if plan is None else plan.capacity.rows, width, *sealing,
        H=heads, SHARED=1 if plan is None else plan.shape.shared, C=head_width,
        HEADS=triton.next_power_of_2(heads), B=build.partials, MERGE=plan is not None,
        LARGEST=largest_code(dtype), INT8=dtype == torch.int8, **page_settings,
        EARLY=early, num_warps=build.warps, maxnreg=build.registers, enable_fp_fusion=False,
        launch_pdl=early,
    )  # fmt: skip
    return coded


def _merging(plan: PlanBuffers | None, out_RHC: Tensor) -> tuple[Tensor, ...]:
    """What the kernel reads of a plan."""
    if plan is None:
        return (out_RHC,) * 5
    partial_o = plan.partial_o.view(out_RHC.dtype)
    parts = (plan[name] for name in ("merge_starts", "merge_rows", "header"))
    return (partial_o, plan.partial_lse, *parts)


def _sealing(
    seals: SealJobs | None, instead: Tensor, most: int
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """What the kernel is handed for pages that are to be sealed, what it is compiled with, and how
    many programs, `most` at most, share them."""
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
    return arguments, settings, min(jobs * layout.kv_heads * 2, most)
