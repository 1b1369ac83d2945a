"""Triton kernels of a router's logits, in pieces that the choice adds up.

Rows in 16 bits are multiplied on tensor cores by weights in three parts of 16 bits, which together
hold a float32's digits: products are exact and sums float32, as if computed in float32. Few tokens
leave most of a GPU idle, so input channels are split over programs; parts are added in their order.

Shapes: T tokens of a tile, D input channels of a block, E experts of a block, S splits.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.routing.choose import choose_logits


@triton.jit
def _exact_dot(w, rows, sums):
    """`sums + w @ rows` of float32 weights as if computed in float32."""
    if rows.dtype == tl.float32:
        return tl.dot(w, rows, sums, input_precision="ieee")
    high = w.to(rows.dtype)
    rest = w - high.to(tl.float32)
    middle = rest.to(rows.dtype)
    low = (rest - middle.to(tl.float32)).to(rows.dtype)
    sums = tl.dot(low, rows, sums)
    sums = tl.dot(middle, rows, sums)
    return tl.dot(high, rows, sums)


@triton.jit(do_not_specialize=["tokens"])
def _logits_of_few(
    x,
    weight,
    parts,
    steps,
    tokens,
    x_stride,
    channels,
    experts,
    T: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """W * D channels, D of them in each of W warps. Weights are read before the wait."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    e = tl.program_id(1) * E + tl.arange(0, E)
    d_WD = tl.program_id(2) * (W * D) + tl.arange(0, W)[:, None] * D + tl.arange(0, D)[None, :]
    inside_WD = d_WD < channels
    inside_WED = (e < experts)[None, :, None] & inside_WD[:, None, :]
    w_WED = tl.load(weight + e[None, :, None] * channels + d_WD[:, None, :], inside_WED, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if COUNT:
        first_program = tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0
        tl.store(steps, tl.load(steps) + 1, first_program)
    inside_WTD = (t < tokens)[None, :, None] & inside_WD[:, None, :]
    rows = x + t.to(tl.int64)[None, :, None] * x_stride + d_WD[:, None, :]
    rows_WTD = tl.load(rows, inside_WTD, other=0.0)
    sums_WET = _exact_dot(w_WED, tl.permute(rows_WTD, (0, 2, 1)), tl.zeros([W, E, T], tl.float32))
    row_T = tl.program_id(2).to(tl.int64) * tokens + t
    inside_ET = (t < tokens)[None, :] & (e < experts)[:, None]
    tl.store(parts + row_T[None, :] * experts + e[:, None], tl.sum(sums_WET, 0), inside_ET)


@triton.jit(do_not_specialize=["tokens"])
def _logits(
    x,
    weight,
    parts,
    steps,
    tokens,
    x_stride,
    channels,
    experts,
    of_split,
    T: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    EARLY: tl.constexpr,
):
    t = tl.program_id(0) * T + tl.arange(0, T)
    e = tl.program_id(1) * E + tl.arange(0, E)
    first = tl.program_id(2) * of_split
    d = tl.arange(0, D)
    inside_t = (t < tokens)[None, :]
    inside_e = (e < experts)[:, None]
    x_DT = x + t.to(tl.int64)[None, :] * x_stride + d[:, None]
    weight_ED = weight + e[:, None] * channels + d[None, :]
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if COUNT:
        first_program = tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0
        tl.store(steps, tl.load(steps) + 1, first_program)
    sums_ET = tl.zeros([E, T], tl.float32)
    for start in tl.range(first, min(first + of_split, channels), D, num_stages=3):
        there = start + d < channels
        w_ED = tl.load(weight_ED + start, inside_e & there[None, :], other=0.0)
        rows_DT = tl.load(x_DT + start, inside_t & there[:, None], other=0.0)
        sums_ET = _exact_dot(w_ED, rows_DT, sums_ET)
    row_T = tl.program_id(2).to(tl.int64) * tokens + t
    to_ET = parts + row_T[None, :] * experts + e[:, None]
    tl.store(to_ET, sums_ET, inside_t & inside_e)


def launch_logits(
    x_TD: Tensor, weight_ED: Tensor, steps: Tensor, options: dict[str, bool]
) -> Tensor:
    """Logits in pieces that are to be added, [S, T, E]."""
    (tokens, channels), experts = x_TD.shape, weight_ED.shape[0]

    def empty(splits: int) -> Tensor:
        return torch.empty((splits, tokens, experts), dtype=torch.float32, device=x_TD.device)

    shape = (tokens, x_TD.stride(0), channels, experts)
    if tokens <= 64:
        tile, block, depth = 16, 16, 64
        parts = empty(triton.cdiv(channels, 4 * depth))
        grid = (triton.cdiv(tokens, tile), triton.cdiv(experts, block), parts.shape[0])
        _logits_of_few[grid](
            x_TD, weight_ED, parts, steps, *shape, T=tile, W=4, D=depth, E=block, **options
        )
        return parts
    tile = choose_logits(tokens, experts, channels)
    of_split = triton.cdiv(triton.cdiv(channels, tile.splits), tile.channels) * tile.channels
    parts = empty(triton.cdiv(channels, of_split))
    grid = (triton.cdiv(tokens, tile.tokens), triton.cdiv(experts, tile.experts), parts.shape[0])
    _logits[grid](
        x_TD,
        weight_ED,
        parts,
        steps,
        *shape,
        of_split,
        T=tile.tokens,
        D=tile.channels,
        E=tile.experts,
        **options,
    )
    return parts
