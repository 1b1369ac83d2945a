"""Filling pages, in Triton: a block for the keys and one for the values of a page's KV head.

Values are read with their tokens in the page's order and transposed after they are 8 bits wide, so
that both the reads and the writes are whole lines. Codes are rounded by adding 1.5 * 2^23, whose
low byte then is the code; contraction into an FMA is off, for it would round otherwise than the
reference does.

Shapes: P pages, R bytes of a record, S rows of 16-bit keys and values, J jobs, G KV heads, N = 64
tokens per page, C head width.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.pages.layout import PAGE_TOKENS, PageLayout
from fourfold.kernels.pages.reference import SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)
_ROUNDER = tl.constexpr(12582912.0)
_N = tl.constexpr(PAGE_TOKENS)


@triton.jit
def quantized_tile(x, LARGEST: tl.constexpr, INT8: tl.constexpr):
    """Codes of a tile, and its scale."""
    x = x.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x)), _SMALLEST)
    x = x * tl.div_rn(LARGEST, amax)
    rounded = (x + _ROUNDER).to(tl.int32, bitcast=True)
    codes = rounded.to(tl.int8) if INT8 else x.to(tl.float8e4nv)
    return codes, amax * (1 / LARGEST)


@triton.jit
def _value_order(place):
    """`VALUE_ORDER`: within 16, bits 3 2 1 0 of the token are bits 1 3 2 0 of its place."""
    return (place & 48) | ((place & 2) << 2) | ((place >> 1) & 6) | (place & 1)


@triton.jit
def seal_half(
    codes_ptr,
    scales_ptr,
    k_ptr,
    v_ptr,
    first,
    page,
    head,
    values,
    record_stride,
    k_stride,
    v_stride,
    G: tl.constexpr,
    C: tl.constexpr,
    LARGEST: tl.constexpr,
    INT8: tl.constexpr,
):
    """Writes the keys, or with `values` the values, of one KV head of a page; its rows begin at
    `first`."""
    place, channel = tl.arange(0, _N), tl.arange(0, C)
    record = codes_ptr + page * record_stride + head * (_N * C)
    scale = scales_ptr + page * (record_stride // 4) + G * _N * C // 2 + head
    if values:
        row = first + _value_order(place)
        x = tl.load(v_ptr + row[:, None] * v_stride + head * C + channel[None, :])
        codes, value_scale = quantized_tile(x, LARGEST, INT8)
        record += G * _N * C
        tl.store(record + channel[:, None] * _N + place[None, :], tl.trans(codes))
        tl.store(scale + G, value_scale)
    else:
        row = first + place
        x = tl.load(k_ptr + row[:, None] * k_stride + head * C + channel[None, :])
        codes, key_scale = quantized_tile(x, LARGEST, INT8)
        tl.store(record + place[:, None] * C + channel[None, :], codes)
        tl.store(scale, key_scale)


@triton.jit
def _seal_kernel(
    codes_ptr,
    scales_ptr,
    k_ptr,
    v_ptr,
    first_row_ptr,
    page_ptr,
    record_stride,
    k_stride,
    v_stride,
    G: tl.constexpr,
    C: tl.constexpr,
    LARGEST: tl.constexpr,
    INT8: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    job, head = tl.program_id(0), tl.program_id(1)
    page = tl.load(page_ptr + job).to(tl.int64)
    first = tl.load(first_row_ptr + job).to(tl.int64)
    if page >= 0:
        seal_half(
            codes_ptr, scales_ptr, k_ptr, v_ptr, first, page, head, tl.program_id(2) == 1,
            record_stride, k_stride, v_stride, G, C, LARGEST, INT8,
        )  # fmt: skip


def launch_seal(
    records_PR: Tensor,
    layout: PageLayout,
    k_SGC: Tensor,
    v_SGC: Tensor,
    first_row_J: Tensor,
    page_J: Tensor,
) -> None:
    """`seal_pages` on checked arguments."""
    if page_J.numel() == 0:
        return
    early = overlaps_launches(records_PR.device)
    _seal_kernel[(page_J.numel(), layout.kv_heads, 2)](
        records_PR.view(layout.codes.dtype),
        records_PR.view(torch.float32),
        k_SGC,
        v_SGC,
        first_row_J,
        page_J,
        records_PR.stride(0),
        k_SGC.stride(0),
        v_SGC.stride(0),
        G=layout.kv_heads,
        C=layout.head_width,
        LARGEST=layout.codes.largest,
        INT8=layout.codes.dtype == torch.int8,
        EARLY=early,
        num_warps=4,
        enable_fp_fusion=False,
        launch_pdl=early,
    )
