"""Triton kernel of the W4A8 products, dense and grouped by expert.

Weights are the left operand: expanded in registers they feed the tensor cores without going through
shared memory again, and the number of tokens is the width of the product, which may be small. A
program has two runs of HALF output rows, gate and up where SwiGLU follows; half of a tile in each
keeps the group parameters of a run in the threads that need them.

Shapes: T tokens of a tile, H rows of a run, K padded input channels, E experts, O rows of the
weight, N tiles of tokens.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.w4a8_gemm.triton_expand import (
    expand_fp8_channel,
    expand_fp8_group,
    expand_int8_channel,
    expand_int8_group,
    group_words,
    lookup_words,
)
from fourfold.kernels.w4a8_gemm.triton_swiglu import swiglu


@triton.jit
def _group(group, block, rows, OUTPUTS, SPAN: tl.constexpr):
    """Parameters of the rows' low and high channels of a block; SPAN is the group's width."""
    low = 0
    high = 0
    if SPAN == 128:
        low = tl.load(group + block * OUTPUTS + rows)
        high = low
    elif SPAN == 64:
        low = tl.load(group + 2 * block * OUTPUTS + rows)
        high = tl.load(group + (2 * block + 1) * OUTPUTS + rows)
    return low, high


@triton.jit
def _expand(packed, low, high, CODES: tl.constexpr, SPAN: tl.constexpr, ASM: tl.constexpr):
    if SPAN == 0:
        if CODES == "int8":
            a, b = expand_int8_channel(packed, ASM)
        else:
            a, b = expand_fp8_channel(packed, ASM)
    elif CODES == "int8":
        low_step, low_offset = group_words(low)
        high_step, high_offset = group_words(high)
        a, b = expand_int8_group(
            packed,
            tl.expand_dims(low_step, -1),
            tl.expand_dims(low_offset, -1),
            tl.expand_dims(high_step, -1),
            tl.expand_dims(high_offset, -1),
            ASM,
        )
    else:
        of_0_to_3, of_4_to_7 = lookup_words(low)
        a, b = expand_fp8_group(
            packed, tl.expand_dims(of_0_to_3, -1), tl.expand_dims(of_4_to_7, -1), ASM
        )
    return a, b


@triton.jit
def _products(
    x,
    source_T,
    inside_T,
    weight,
    group,
    first_H,
    second_H,
    OUTPUTS,
    K,
    CODES: tl.constexpr,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sums [H, T] of two runs of rows of a weight with rows of x."""
    HALF: tl.constexpr = first_H.shape[0]
    TILE: tl.constexpr = source_T.shape[0]
    SUMS: tl.constexpr = tl.int32 if CODES == "int8" else tl.float32
    j = tl.arange(0, 64)
    x_T64 = x + source_T.to(tl.int64)[:, None] * K + j[None, :]
    inside_T1 = inside_T[:, None]
    sums1 = tl.zeros([HALF, TILE], SUMS)
    sums2 = tl.zeros([HALF, TILE], SUMS)
    if BITS == 8 and SPLIT > 1:
        s = tl.arange(0, SPLIT)[:, None]
        x_ST64 = x_T64[None, :, :] + (s * 128)[:, :, None]
        w1 = weight + first_H.to(tl.int64)[None, :, None] * K + (s * 128 + j[None, :])[:, None, :]
        w2 = weight + second_H.to(tl.int64)[None, :, None] * K + (s * 128 + j[None, :])[:, None, :]
        inside_1T1 = inside_T1[None]
        parts1 = tl.zeros([SPLIT, HALF, TILE], SUMS)
        parts2 = tl.zeros([SPLIT, HALF, TILE], SUMS)
        for block in tl.range(0, K // 128, SPLIT, num_stages=STAGES):
            low_ST64 = tl.load(x_ST64 + block * 128, inside_1T1, other=0.0)
            high_ST64 = tl.load(x_ST64 + block * 128 + 64, inside_1T1, other=0.0)
            low_S64T = tl.permute(low_ST64, (0, 2, 1))
            high_S64T = tl.permute(high_ST64, (0, 2, 1))
            parts1 = tl.dot(tl.load(w1 + block * 128), low_S64T, parts1, out_dtype=SUMS)
            parts2 = tl.dot(tl.load(w2 + block * 128), low_S64T, parts2, out_dtype=SUMS)
            parts1 = tl.dot(tl.load(w1 + block * 128 + 64), high_S64T, parts1, out_dtype=SUMS)
            parts2 = tl.dot(tl.load(w2 + block * 128 + 64), high_S64T, parts2, out_dtype=SUMS)
        sums1, sums2 = tl.sum(parts1, 0), tl.sum(parts2, 0)
    elif BITS == 8:
        w1 = weight + first_H.to(tl.int64)[:, None] * K + j[None, :]
        w2 = weight + second_H.to(tl.int64)[:, None] * K + j[None, :]
        for block in tl.range(0, K // 128, num_stages=STAGES):
            low_T64 = tl.load(x_T64 + block * 128, inside_T1, other=0.0)
            high_T64 = tl.load(x_T64 + block * 128 + 64, inside_T1, other=0.0)
            sums1 = tl.dot(tl.load(w1 + block * 128), low_T64.T, sums1, out_dtype=SUMS)
            sums2 = tl.dot(tl.load(w2 + block * 128), low_T64.T, sums2, out_dtype=SUMS)
            sums1 = tl.dot(tl.load(w1 + block * 128 + 64), high_T64.T, sums1, out_dtype=SUMS)
            sums2 = tl.dot(tl.load(w2 + block * 128 + 64), high_T64.T, sums2, out_dtype=SUMS)
    elif SPLIT > 1:
        s = tl.arange(0, SPLIT)[:, None]
        x_ST64 = x_T64[None, :, :] + (s * 128)[:, :, None]
        w1 = weight + (s * (OUTPUTS * 64) + first_H[None, :] * 64)[:, :, None] + j[None, None, :]
        w2 = weight + (s * (OUTPUTS * 64) + second_H[None, :] * 64)[:, :, None] + j[None, None, :]
        parts1 = tl.zeros([SPLIT, HALF, TILE], SUMS)
        parts2 = tl.zeros([SPLIT, HALF, TILE], SUMS)
        for block in tl.range(0, K // 128, SPLIT, num_stages=STAGES):
            packed1 = tl.load(w1 + block * (OUTPUTS * 64))
            packed2 = tl.load(w2 + block * (OUTPUTS * 64))
            low_S64T = tl.permute(
                tl.load(x_ST64 + block * 128, inside_T1[None], other=0.0), (0, 2, 1)
            )
            high_S64T = tl.permute(
                tl.load(x_ST64 + block * 128 + 64, inside_T1[None], other=0.0), (0, 2, 1)
            )
            low1, high1 = _group(group, block + s, first_H[None, :], OUTPUTS, SPAN)
            low2, high2 = _group(group, block + s, second_H[None, :], OUTPUTS, SPAN)
            a, b = _expand(packed1, low1, high1, CODES, SPAN, ASM)
            parts1 = tl.dot(a, low_S64T, parts1, out_dtype=SUMS)
            parts1 = tl.dot(b, high_S64T, parts1, out_dtype=SUMS)
            a, b = _expand(packed2, low2, high2, CODES, SPAN, ASM)
            parts2 = tl.dot(a, low_S64T, parts2, out_dtype=SUMS)
            parts2 = tl.dot(b, high_S64T, parts2, out_dtype=SUMS)
        sums1, sums2 = tl.sum(parts1, 0), tl.sum(parts2, 0)
    else:
        w1 = weight + first_H[:, None] * 64 + j[None, :]
        w2 = weight + second_H[:, None] * 64 + j[None, :]
        blocks = K // 128
        for block in tl.range(0, blocks, num_stages=STAGES):
            packed1 = tl.load(w1 + block * (OUTPUTS * 64))
            packed2 = tl.load(w2 + block * (OUTPUTS * 64))
            low_T64 = tl.load(x_T64 + block * 128, inside_T1, other=0.0)
            high_T64 = tl.load(x_T64 + block * 128 + 64, inside_T1, other=0.0)
            low1, high1 = _group(group, block, first_H, OUTPUTS, SPAN)
            low2, high2 = _group(group, block, second_H, OUTPUTS, SPAN)
            a, b = _expand(packed1, low1, high1, CODES, SPAN, ASM)
            sums1 = tl.dot(a, low_T64.T, sums1, out_dtype=SUMS)
            sums1 = tl.dot(b, high_T64.T, sums1, out_dtype=SUMS)
            a, b = _expand(packed2, low2, high2, CODES, SPAN, ASM)
            sums2 = tl.dot(a, low_T64.T, sums2, out_dtype=SUMS)
            sums2 = tl.dot(b, high_T64.T, sums2, out_dtype=SUMS)
    return sums1.to(tl.float32), sums2.to(tl.float32)


@triton.jit(do_not_specialize=["T", "N"])
def _gemm(
    x,
    x_scale,
    weight,
    w_scale,
    group,
    order,
    tiles,
    y,
    T,
    OUTPUTS,
    K,
    N,
    WIDTH,
    UNIT: tl.constexpr,
    CODES: tl.constexpr,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
    CHOICES: tl.constexpr,
    SCATTER: tl.constexpr,
    SWIGLU: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
):
    COLUMNS: tl.constexpr = HALF if SWIGLU else 2 * HALF
    FEW: tl.constexpr = 0 if GROUPED else 16
    columns = tl.cdiv(WIDTH, COLUMNS)
    h = tl.arange(0, HALF)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for index in range(tl.program_id(0), N * columns, tl.num_programs(0)):
        # A few tiles of tokens take the same rows of a weight together, so that it is read once;
        # of many, the same tokens take all of its rows.
        few = N <= FEW
        n = tl.where(few, index % N, index // columns)
        column = tl.where(few, index // N, index % columns)
        o = column * COLUMNS + h
        if GROUPED:
            expert = tl.load(tiles + n)
            row = tl.load(tiles + N + n)
            end = tl.load(tiles + 2 * N + n)
        else:
            expert = 0
            row = n * TILE
            end = T
        if expert >= 0:
            of_expert = tl.cast(expert, tl.int64) * OUTPUTS * (K // 128)
            weight_of_expert = weight + of_expert * (64 if BITS == 4 else 128)
            if SPAN > 0:  # noqa: SIM108 (a branch that is not compiled)
                group_of_expert = group + of_expert * (128 // SPAN)
            else:
                group_of_expert = group
            # Rows past the last count as zeros and are never written.
            row_T = row + tl.arange(0, TILE)
            inside_T = row_T < end
            row_T = tl.minimum(row_T, end - 1)
            source_T = row_T
            goal_T = row_T
            if CHOICES > 0 or SCATTER:
                flat_T = tl.load(order + row_T)
                if CHOICES > 0:
                    source_T = flat_T // CHOICES
                if SCATTER:
                    goal_T = flat_T
            if SWIGLU:
                first_H = tl.minimum(o, WIDTH - 1)
                second_H = first_H + WIDTH
            else:
                first_H = tl.minimum(o, OUTPUTS - 1)
                second_H = tl.minimum(o + HALF, OUTPUTS - 1)
            gate_HT, up_HT = _products(
                x,
                source_T,
                inside_T,
                weight_of_expert,
                group_of_expert,
                first_H,
                second_H,
                OUTPUTS,
                K,
                CODES,
                BITS,
                SPAN,
                SPLIT,
                STAGES,
                ASM,
            )
            scale_T = tl.load(x_scale + source_T)[None, :]
            gate_HT *= scale_T * (tl.load(w_scale + expert * OUTPUTS + first_H) * UNIT)[:, None]
            up_HT *= scale_T * (tl.load(w_scale + expert * OUTPUTS + second_H) * UNIT)[:, None]
            y_T1 = y + goal_T.to(tl.int64)[:, None] * WIDTH
            if SWIGLU:
                y_HT = swiglu(gate_HT, up_HT, ASM)
                y_TH = tl.trans(y_HT.to(y.dtype.element_ty))
                tl.store(y_T1 + o[None, :], y_TH, inside_T[:, None] & (o < WIDTH)[None, :])
            else:
                y1_TH = tl.trans(gate_HT.to(y.dtype.element_ty))
                y2_TH = tl.trans(up_HT.to(y.dtype.element_ty))
                o2 = o + HALF
                tl.store(y_T1 + o[None, :], y1_TH, inside_T[:, None] & (o < WIDTH)[None, :])
                tl.store(y_T1 + o2[None, :], y2_TH, inside_T[:, None] & (o2 < WIDTH)[None, :])
