"""The norm of a sum, and its gradients, in Triton.

Backward a program takes every so many-th block of rows and adds up what its rows give the weight in
registers; the sums of all programs are added afterwards, in their order.

Shapes: T tokens, D width.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
_PROGRAMS = 512


@triton.jit(do_not_specialize=["T"])
def _add_norm_kernel(
    stream,
    delta,
    weight,
    normed,
    added,
    T,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < T)[:, None] & (channel < D)[None, :]
    place = row[:, None] * D + channel[None, :]
    x = tl.load(stream + place, inside, other=0.0)
    if ADD:
        # Normed is what the stream goes on with, rounded.
        x = (x.to(tl.float32) + tl.load(delta + place, inside, other=0.0)).to(x.dtype)
        tl.store(added + place, x, inside)
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    w = tl.load(weight + channel, channel < D, other=0.0).to(tl.float32)
    y = x * inverse[:, None] * w[None, :]
    tl.store(normed + place, y.to(normed.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T"])
def _norm_backward_kernel(
    grad_normed,
    grad_added,
    added,
    weight,
    grad,
    sums,
    T,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.arange(0, CHANNELS)
    w = tl.load(weight + channel, channel < D, other=0.0).to(tl.float32)[None, :]
    sum_RD = tl.zeros([ROWS, CHANNELS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < T)[:, None] & (channel < D)[None, :]
        place = row[:, None] * D + channel[None, :]
        x = tl.load(added + place, inside, other=0.0).to(tl.float32)
        dy = tl.load(grad_normed + place, inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        unit = x * inverse
        sum_RD += dy * unit
        dy *= w
        dx = inverse * (dy - unit * (tl.sum(dy * unit, 1) / D)[:, None])
        if ADD:
            dx += tl.load(grad_added + place, inside, other=0.0).to(tl.float32)
        tl.store(grad + place, dx.to(grad.dtype.element_ty), inside)
    mine = sums + tl.program_id(0) * D + channel
    tl.store(mine, tl.sum(sum_RD, 0), channel < D)


def _tile(width: int) -> dict[str, int]:
    channels = triton.next_power_of_2(width)
    return {"ROWS": max(1, _TILE // channels), "CHANNELS": channels, "num_warps": 8}


def launch(
    stream_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_norm` on checked arguments."""
    tokens, width = stream_TD.shape
    tile = _tile(width)
    normed_TD = torch.empty_like(stream_TD)
    added_TD = stream_TD if delta_TD is None else torch.empty_like(stream_TD)
    _add_norm_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
        stream_TD,
        stream_TD if delta_TD is None else delta_TD,
        weight_D,
        normed_TD,
        added_TD,
        tokens,
        eps,
        D=width,
        ADD=delta_TD is not None,
        **tile,
    )
    return normed_TD, added_TD


def launch_backward(
    grad_normed_TD: Tensor,
    grad_added_TD: Tensor | None,
    added_TD: Tensor,
    weight_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`add_norm_backward` on checked arguments."""
    tokens, width = added_TD.shape
    tile = _tile(width)
    grad_TD = torch.empty_like(added_TD)
    programs = min(_PROGRAMS, triton.cdiv(tokens, tile["ROWS"]))
    sums_PD = torch.empty((programs, width), dtype=torch.float32, device=added_TD.device)
    _norm_backward_kernel[(programs,)](
        grad_normed_TD,
        grad_normed_TD if grad_added_TD is None else grad_added_TD,
        added_TD,
        weight_D,
        grad_TD,
        sums_PD,
        tokens,
        eps,
        D=width,
        ADD=grad_added_TD is not None,
        **tile,
    )
    return grad_TD, sums_PD.sum(0)
