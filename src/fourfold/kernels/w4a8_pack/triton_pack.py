"""Rounding to packed codes, in Triton: a program fits its rows' scales, then walks their blocks of
channels once, fits each group's parameters and packs two nibbles to a byte.

Every operation is one that IEEE rounds as PyTorch does, in the same order: divisions are exact,
contraction into an FMA is off. Sums of errors are in float64, where their order does not matter.

Shapes: N rows of a program, J = 64 bytes of a block of 128 channels.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import HALF, PackedW4A8, W4A8Recipe

_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and subtracted, it rounds to integers
_PROTECTIVE = tl.constexpr(119.0)
_TINY = tl.constexpr(1e-30)
_ROWS = 16
_WARPS = 4


@triton.jit
def _round(x):
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _int8_nibbles(x_NJ, first_N, step_N):
    """Nibbles, as floats, of codes `first + nibble * step` within 8 bits."""
    highest_N = tl.minimum(tl.floor(tl.div_rn(127.0 - first_N, step_N)), 15.0)
    shifted_NJ = x_NJ - first_N[:, None]
    steps_NJ = tl.broadcast_to(step_N[:, None], x_NJ.shape)
    nibble_NJ = _round(tl.div_rn(shifted_NJ, steps_NJ))
    return tl.maximum(tl.minimum(nibble_NJ, highest_N[:, None]), 0.0)


@triton.jit
def _int8_error(x_NJ, first_N, step_N):
    code_NJ = _int8_nibbles(x_NJ, first_N, step_N) * step_N[:, None] + first_N[:, None]
    off_NJ = code_NJ - x_NJ
    return tl.sum((off_NJ * off_NJ).to(tl.float64), 1)


@triton.jit
def _fit_int8(x_NJ, y_NJ, JOINT: tl.constexpr):
    """First code and step of the groups x, or of x and y together: (first_N, step_N)."""
    low_N, high_N = tl.min(x_NJ, 1), tl.max(x_NJ, 1)
    if JOINT:
        low_N = tl.minimum(low_N, tl.min(y_NJ, 1))
        high_N = tl.maximum(high_N, tl.max(y_NJ, 1))
    low_N = _clamp(low_N, -_PROTECTIVE, _PROTECTIVE)
    high_N = _clamp(high_N, -_PROTECTIVE, _PROTECTIVE)
    needed_N = _clamp(tl.ceil(tl.div_rn(high_N - _round(low_N), 15.0)), 1.0, 16.0)
    best_first_N, best_step_N = _round(low_N), needed_N
    least_N = _int8_error(x_NJ, best_first_N, best_step_N)
    if JOINT:
        least_N += _int8_error(y_NJ, best_first_N, best_step_N)
    for cut in tl.static_range(1, 4):
        step_N = tl.maximum(needed_N - cut, 1.0)
        for half in tl.static_range(-1, 2):
            middle_N = (high_N + low_N) / 2 + (half * 0.5) * step_N
            first_N = _clamp(_round(middle_N - step_N * 7.5), -128.0, _PROTECTIVE)
            error_N = _int8_error(x_NJ, first_N, step_N)
            if JOINT:
                error_N += _int8_error(y_NJ, first_N, step_N)
            better_N = error_N < least_N
            best_first_N = tl.where(better_N, first_N, best_first_N)
            best_step_N = tl.where(better_N, step_N, best_step_N)
            least_N = tl.where(better_N, error_N, least_N)
    return best_first_N, best_step_N


@triton.jit
def _fp8_codes(x_NJ, exponent_N):
    """Signed magnitudes, as floats, of codes `magnitude * 2^exponent`."""
    inverse_N = ((127 - exponent_N) << 23).to(tl.float32, bitcast=True)
    return _clamp(_round(x_NJ * inverse_N[:, None]), -7.0, 7.0)


@triton.jit
def _fp8_error(x_NJ, exponent_N):
    unit_N = ((127 + exponent_N) << 23).to(tl.float32, bitcast=True)
    off_NJ = _fp8_codes(x_NJ, exponent_N) * unit_N[:, None] - x_NJ
    return tl.sum((off_NJ * off_NJ).to(tl.float64), 1)


@triton.jit
def _fit_fp8(x_NJ, y_NJ):
    """Exponents of the groups of x and y together."""
    largest_N = tl.maximum(tl.max(tl.abs(x_NJ), 1), tl.max(tl.abs(y_NJ), 1))
    bits_N = tl.div_rn(tl.maximum(largest_N, _TINY), 7.0).to(tl.int32, bitcast=True)
    # The logarithm, rounded up.
    needed_N = (bits_N >> 23) - 127 + ((bits_N & 0x7FFFFF) != 0).to(tl.int32)
    needed_N = _clamp(needed_N, 0, 12)
    less_N = tl.maximum(needed_N - 1, 0)
    error_N = _fp8_error(x_NJ, needed_N) + _fp8_error(y_NJ, needed_N)
    least_N = _fp8_error(x_NJ, less_N) + _fp8_error(y_NJ, less_N)
    return tl.where(error_N < least_N, needed_N, less_N)


@triton.jit
def _fp8_nibbles(x_NJ, exponent_N):
    code_NJ = _fp8_codes(x_NJ, exponent_N)
    return tl.abs(code_NJ).to(tl.int32) + tl.where(code_NJ < 0, 8, 0)


@triton.jit(do_not_specialize=["rows"])
def _pack_kernel(
    weight,
    packed,
    scale,
    group,
    rows,
    outputs,
    inputs,
    FP8: tl.constexpr,
    JOINT: tl.constexpr,
    BLOCKS: tl.constexpr,
    N: tl.constexpr,
    J: tl.constexpr,
):
    row_N = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    real_N1 = (row_N < rows)[:, None]
    expert_N, output_N = row_N // outputs, row_N % outputs
    source_N1 = weight + (row_N * inputs)[:, None]
    channel = tl.arange(0, 2 * J)
    largest_N = tl.full([N], _TINY, tl.float32)
    for block in range(BLOCKS):
        at = block * (2 * J) + channel[None, :]
        x = tl.load(source_N1 + at, real_N1 & (at < inputs), other=0.0).to(tl.float32)
        largest_N = tl.maximum(largest_N, tl.max(tl.abs(x), 1))
    scale_N = tl.div_rn(largest_N, 28672.0 if FP8 else _PROTECTIVE)
    tl.store(scale + row_N, scale_N, row_N < rows)
    j = tl.arange(0, J)
    # The channels of a byte's two nibbles.
    lower = (j // 4) * 4 + (j % 2) * 2 + (j % 4) // 2 * J if FP8 else j
    upper = lower + 1 if FP8 else j + J
    GROUPS: tl.constexpr = BLOCKS if JOINT else 2 * BLOCKS
    scales_NJ = tl.broadcast_to(scale_N[:, None], (N, J))
    for block in range(BLOCKS):
        at = block * (2 * J) + lower[None, :]
        x = tl.load(source_N1 + at, real_N1 & (at < inputs), other=0.0).to(tl.float32)
        x = tl.div_rn(x, scales_NJ)
        at = block * (2 * J) + upper[None, :]
        y = tl.load(source_N1 + at, real_N1 & (at < inputs), other=0.0).to(tl.float32)
        y = tl.div_rn(y, scales_NJ)
        if FP8:
            exponent_N = _fit_fp8(x, y)
            low, high = _fp8_nibbles(x, exponent_N), _fp8_nibbles(y, exponent_N)
            place_N = (expert_N * GROUPS + block) * outputs + output_N
            tl.store(group + place_N, exponent_N.to(tl.uint8), row_N < rows)
        else:
            first_N, step_N = _fit_int8(x, y, JOINT)
            groups = 1 if JOINT else 2
            place_N = (expert_N * GROUPS + block * groups) * outputs + output_N
            tl.store(group + place_N, _parameters(first_N, step_N), row_N < rows)
            low = _int8_nibbles(x, first_N, step_N).to(tl.int32)
            if not JOINT:
                first_N, step_N = _fit_int8(y, x, JOINT)
                tl.store(group + place_N + outputs, _parameters(first_N, step_N), row_N < rows)
            high = _int8_nibbles(y, first_N, step_N).to(tl.int32)
        place_N = ((expert_N * BLOCKS + block) * outputs + output_N) * J
        tl.store(packed + place_N[:, None] + j[None, :], (low | (high << 4)).to(tl.uint8), real_N1)


@triton.jit
def _parameters(first_N, step_N):
    """step | (offset << 8), the offset being 128 + first."""
    return (step_N.to(tl.int32) + ((first_N.to(tl.int32) + 128) << 8)).to(tl.int16)


def launch(weight_EOK: Tensor, packed: PackedW4A8) -> None:
    """Fills `packed`, whose recipe has groups."""
    experts, blocks, outputs, _ = packed.packed_EBOJ.shape
    rows = experts * outputs
    _pack_kernel[(triton.cdiv(rows, _ROWS),)](
        weight_EOK,
        packed.packed_EBOJ,
        packed.scale_EO,
        packed.group_EGO,
        rows,
        outputs,
        packed.inputs,
        FP8=packed.recipe is W4A8Recipe.FP8_G128,
        JOINT=packed.recipe is not W4A8Recipe.INT8_G64,
        BLOCKS=blocks,
        N=_ROWS,
        J=HALF,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
