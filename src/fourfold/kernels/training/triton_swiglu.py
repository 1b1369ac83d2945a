"""The gated SwiGLU and its gradients in Triton: a program takes some rows, a tile of channels after
the other.

Shapes: R rows, F FFN width.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096


@triton.jit(do_not_specialize=["R"])
def _swiglu_kernel(
    gate_up,
    gates,
    hidden,
    R,
    F: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < R)[:, None] & (channel < F)[None, :]
    place = gate_up + row[:, None] * (2 * F) + channel[None, :]
    gate = tl.load(place, inside, other=0.0).to(tl.float32)
    up = tl.load(place + F, inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    if GATED:
        y *= tl.load(gates + row, row < R, other=0.0)[:, None]
    out = hidden + row[:, None] * F + channel[None, :]
    tl.store(out, y.to(hidden.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["R"])
def _swiglu_backward_kernel(
    grad,
    gate_up,
    gates,
    grad_gate_up,
    grad_gates,
    R,
    F: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.full([ROWS], 1.0, tl.float32)
    if GATED:
        weight = tl.load(gates + row, row < R, other=0.0)
    sum_R = tl.zeros([ROWS], tl.float32)
    for first in range(0, F, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = (row < R)[:, None] & (channel < F)[None, :]
        place = row[:, None] * (2 * F) + channel[None, :]
        gate = tl.load(gate_up + place, inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + place + F, inside, other=0.0).to(tl.float32)
        upstream = row[:, None] * F + channel[None, :]
        dy = tl.load(grad + upstream, inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        if GATED:
            sum_R += tl.sum(dy * silu * up, 1)
            dy *= weight[:, None]
        d_gate = dy * up * (share + silu * (1.0 - share))
        kind = grad_gate_up.dtype.element_ty
        tl.store(grad_gate_up + place, d_gate.to(kind), inside)
        tl.store(grad_gate_up + place + F, (dy * silu).to(kind), inside)
    if GATED:
        tl.store(grad_gates + row, sum_R, row < R)


def _tile(width: int) -> dict[str, int]:
    channels = min(1024, triton.next_power_of_2(width))
    return {"ROWS": _TILE // channels, "CHANNELS": channels}


def launch(gate_up_RF: Tensor, gates_R: Tensor | None) -> Tensor:
    """`gated_swiglu` on checked arguments."""
    rows, width = len(gate_up_RF), gate_up_RF.shape[1] // 2
    hidden_RF = torch.empty((rows, width), dtype=gate_up_RF.dtype, device=gate_up_RF.device)
    if rows == 0:
        return hidden_RF
    tile = _tile(width)
    gated = gates_R is not None
    grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["CHANNELS"]))
    _swiglu_kernel[grid](
        gate_up_RF,
        gates_R if gated else gate_up_RF,
        hidden_RF,
        rows,
        F=width,
        GATED=gated,
        **tile,
    )
    return hidden_RF


def launch_backward(
    grad_RF: Tensor, gate_up_RF: Tensor, gates_R: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`gated_swiglu_backward` on checked arguments."""
    rows, width = grad_RF.shape
    grad_gate_up = torch.empty_like(gate_up_RF)
    gated = gates_R is not None
    grad_gates = torch.empty(rows, dtype=torch.float32, device=grad_RF.device) if gated else None
    if rows == 0:
        return grad_gate_up, grad_gates
    tile = _tile(width)
    _swiglu_backward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        grad_RF,
        gate_up_RF,
        gates_R if gated else gate_up_RF,
        grad_gate_up,
        grad_gates if gated else grad_gate_up,
        rows,
        F=width,
        GATED=gated,
        **tile,
    )
    return grad_gate_up, grad_gates
