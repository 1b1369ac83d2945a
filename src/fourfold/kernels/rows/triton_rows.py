"""Rows in 8 bits, in Triton: one pass, a whole row in one block's registers.

A 2-D tile of rows instead of a loop over channels: rows up to 16384 channels fit, and nothing is
read twice. Codes are rounded by adding 1.5 * 2^23, whose low byte then is the code: one addition
instead of a conversion; contraction into an FMA is off, for it would round otherwise than the
reference does.

Shapes: T rows, K channels, padded to W, D model width, b = 32 channels that are turned together.
"""

# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.rows.choose import Tile, choose_tile
from fourfold.kernels.rows.reference import SMALLEST, NormedRows, Rows, largest_code

_SMALLEST = tl.constexpr(SMALLEST)
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _store_codes(
    y,
    codes_ptr,
    scale_ptr,
    first_row,
    rows,
    width,
    LARGEST: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Quantises the tile y [ROWS, CHANNELS], zeros beyond its channels."""
    row = first_row + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    y = y.to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(y), 1), _SMALLEST)
    y = y * tl.div_rn(LARGEST, amax)[:, None]
    rounded = (y + _ROUNDER).to(tl.int32, bitcast=True)
    codes = rounded.to(tl.int8) if INT8 else y.to(tl.float8e4nv)
    place = row.to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(codes_ptr + place, codes, mask=(row < rows)[:, None] & (channel < width)[None, :])
    tl.store(scale_ptr + row, amax * (1 / LARGEST), mask=row < rows)


@triton.jit
def _quantize_kernel(
    x_ptr,
    turn_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    x_stride,
    channels,
    width,
    LARGEST: tl.constexpr,
    INT8: tl.constexpr,
    SWIGLU: tl.constexpr,
    TURN: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EARLY: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    place = row.to(tl.int64)[:, None] * x_stride + channel[None, :]
    if TURN > 0:
        of_block = tl.arange(0, TURN)
        turn = tl.load(turn_ptr + of_block[:, None] * TURN + of_block[None, :])
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    y = tl.load(x_ptr + place, mask=inside, other=0.0)
    if SWIGLU:
        up = tl.load(x_ptr + place + channels, mask=inside, other=0.0)
        gate = y.to(tl.float32)
        y = (gate / (1 + tl.exp(-gate)) * up.to(tl.float32)).to(up.dtype)
    if TURN > 0:
        blocks = tl.reshape(y, (ROWS * CHANNELS // TURN, TURN))
        if y.dtype == tl.float32:
            turned = tl.dot(blocks, turn, input_precision="tf32")
        else:
            # The matrix in two parts of 16 bits, so that only its own rounding is left out.
            high = turn.to(y.dtype)
            low = (turn - high.to(tl.float32)).to(y.dtype)
            turned = tl.dot(blocks, low, tl.dot(blocks, high))
        y = tl.reshape(turned, (ROWS, CHANNELS))
    _store_codes(
        y, codes_ptr, scale_ptr, first_row, rows, width, LARGEST, INT8, ROWS, CHANNELS
    )  # fmt: skip


@triton.jit
def _weighted_sum(
    parts_ptr,
    gates_ptr,
    live_ptr,
    row,
    rows,
    channel,
    channels,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The sum of a row's parts times their gates, in their order, as `combine` computes it."""
    there = row < rows
    if MASKED:
        there &= tl.load(live_ptr + row, mask=there, other=0) != 0
    inside = there[:, None] & (channel < channels)[None, :]
    total = tl.zeros(inside.shape, tl.float32)
    first = row.to(tl.int64) * PARTS
    for part in tl.static_range(0, PARTS, 4):
        # Four parts are asked for before the first is waited for.
        gate0, value0 = _part(parts_ptr, gates_ptr, first + part, there, inside, channel, channels)
        if part + 1 < PARTS:
            gate1, value1 = _part(
                parts_ptr, gates_ptr, first + part + 1, there, inside, channel, channels
            )
        if part + 2 < PARTS:
            gate2, value2 = _part(
                parts_ptr, gates_ptr, first + part + 2, there, inside, channel, channels
            )
        if part + 3 < PARTS:
            gate3, value3 = _part(
                parts_ptr, gates_ptr, first + part + 3, there, inside, channel, channels
            )
        total = tl.fma(gate0, value0.to(tl.float32), total)
        if part + 1 < PARTS:
            total = tl.fma(gate1, value1.to(tl.float32), total)
        if part + 2 < PARTS:
            total = tl.fma(gate2, value2.to(tl.float32), total)
        if part + 3 < PARTS:
            total = tl.fma(gate3, value3.to(tl.float32), total)
    return total


@triton.jit
def _part(parts_ptr, gates_ptr, part, there, inside, channel, channels):
    gate = tl.load(gates_ptr + part, mask=there, other=0.0).to(tl.float32)
    place = parts_ptr + part[:, None] * channels + channel[None, :]
    return tl.broadcast_to(gate[:, None], inside.shape), tl.load(place, mask=inside, other=0.0)


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    summed_ptr,
    normed_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    x_stride,
    residual_stride,
    gates_ptr,
    live_ptr,
    channels,
    width,
    eps,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORMED: tl.constexpr,
    LARGEST: tl.constexpr,
    INT8: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EARLY: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    at = row.to(tl.int64)[:, None]
    weight = tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if PARTS == 0:
        x = tl.load(x_ptr + at * x_stride + channel[None, :], mask=inside, other=0.0)
    else:
        x = _weighted_sum(
            x_ptr, gates_ptr, live_ptr, row, rows, channel, channels, PARTS, MASKED
        ).to(x_ptr.dtype.element_ty)
    kept = at * channels + channel[None, :]
    if RESIDUAL:
        other = residual_ptr + at * residual_stride + channel[None, :]
        added = tl.load(other, mask=inside, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
    if RESIDUAL or PARTS > 0:
        tl.store(summed_ptr + kept, x, mask=inside)
    y = x.to(tl.float32)
    mean = tl.sum(y * y, 1) / channels
    y = y * tl.rsqrt(mean + eps)[:, None] * weight[None, :]
    if NORMED:
        tl.store(normed_ptr + kept, y.to(x.dtype), mask=inside)
    _store_codes(
        y, codes_ptr, scale_ptr, first_row, rows, width, LARGEST, INT8, ROWS, CHANNELS
    )  # fmt: skip


def launch_quantize(
    x_TK: Tensor,
    dtype: torch.dtype,
    width: int,
    turn_bb: Tensor | None,
    *,
    swiglu: bool = False,
) -> Rows:
    """`quantize_rows` on checked arguments."""
    rows, channels = x_TK.shape
    if swiglu:
        channels //= 2
    out = _empty(x_TK, dtype, width)
    tile = choose_tile(rows, width, turned=turn_bb is not None, swiglu=swiglu)
    if rows > 0:
        _quantize_kernel[_grid(rows, tile)](
            x_TK,
            x_TK if turn_bb is None else turn_bb,
            out.codes_TW,
            out.scale_T,
            rows,
            x_TK.stride(0),
            channels,
            width,
            SWIGLU=swiglu,
            TURN=0 if turn_bb is None else turn_bb.shape[0],
            **_settings(x_TK, dtype, tile),
        )
    return out


def launch_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    width: int,
    residual_TD: Tensor | None,
    keep_normed: bool,
    gates_TK: Tensor | None = None,
    live_T: Tensor | None = None,
) -> NormedRows:
    """`rms_norm_quantize` on checked arguments."""
    rows, channels = x_TD.shape[0], x_TD.shape[-1]
    out = _empty(x_TD, dtype, width)
    alone = residual_TD is None and gates_TK is None
    summed = x_TD if alone else x_TD.new_empty(rows, channels)
    normed = x_TD.new_empty(rows, channels) if keep_normed else None
    residual = x_TD if residual_TD is None else residual_TD
    tile = choose_tile(rows, width)
    if rows > 0:
        _norm_kernel[_grid(rows, tile)](
            x_TD,
            residual,
            weight_D,
            summed,
            x_TD if normed is None else normed,
            out.codes_TW,
            out.scale_T,
            rows,
            x_TD.stride(0),
            residual.stride(0),
            x_TD if gates_TK is None else gates_TK,
            x_TD if live_T is None else live_T,
            channels,
            width,
            eps,
            PARTS=0 if gates_TK is None else gates_TK.shape[1],
            MASKED=live_T is not None,
            RESIDUAL=residual_TD is not None,
            NORMED=keep_normed,
            **_settings(x_TD, dtype, tile),
        )
    return NormedRows(normed, out, summed)


def _empty(x_TK: Tensor, dtype: torch.dtype, width: int) -> Rows:
    rows = x_TK.shape[0]
    return Rows(
        torch.empty(rows, width, dtype=dtype, device=x_TK.device),
        torch.empty(rows, dtype=torch.float32, device=x_TK.device),
    )


def _grid(rows: int, tile: Tile) -> tuple[int]:
    return (triton.cdiv(rows, tile.rows),)


def _settings(x: Tensor, dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    """What both kernels are compiled with."""
    early = overlaps_launches(x.device)
    return {
        "LARGEST": largest_code(dtype),
        "INT8": dtype == torch.int8,
        "ROWS": tile.rows,
        "CHANNELS": tile.channels,
        "num_warps": tile.warps,
        "enable_fp_fusion": False,
        "EARLY": early,
        "launch_pdl": early,
    }
