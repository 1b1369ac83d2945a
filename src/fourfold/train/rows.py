"""Routed rows and back, and the FFN's gate, with gradients that keep little and add in a fixed
order.

Spreading tokens to rows and collecting rows to tokens are each other's gradient.

Shapes: T tokens, D width, F expert width, K choices of a token, R = T K rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.choices = choices
        return x_TD[order_R // choices]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return _summed(grad_RD, order_R, ctx.choices), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_R: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.choices = choices
        return _summed(rows_RD, order_R, choices)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return grad_TD[order_R // ctx.choices], None, None


def spread_rows(x_TD: Tensor, order_R: Tensor, choices: int) -> Tensor:
    """Row r is token `order_R[r] // choices`: tokens to rows in sorted order, [R, D]."""
    rows_RD: Tensor = _Spread.apply(x_TD, order_R, choices)  # type: ignore[no-untyped-call]
    return rows_RD


def collect_rows(rows_RD: Tensor, order_R: Tensor, choices: int) -> Tensor:
    """The sum over each token's rows, in the order of its choices, [T, D]."""
    x_TD: Tensor = _Collect.apply(rows_RD, order_R, choices)  # type: ignore[no-untyped-call]
    return x_TD


def permuted(rows: Tensor, order_R: Tensor) -> Tensor:
    """The rows in another order, each once."""
    return spread_rows(rows, order_R, 1)


def _summed(rows_RD: Tensor, order_R: Tensor, choices: int) -> Tensor:
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    rows_TKD = rows_RD[place_R].view(-1, choices, rows_RD.shape[1])
    return rows_TKD.sum(1) if choices > 1 else rows_TKD[:, 0]


def gated_swiglu(gate_up_RF: Tensor, gates_R: Tensor) -> Tensor:
    """`silu(gate) * up` times the row's gate, in the dtype of the rows; [R, 2F] -> [R, F]."""
    gate, up = gate_up_RF.chunk(2, dim=-1)
    hidden_RF = F.silu(gate.float()) * up.float() * gates_R[:, None]
    return hidden_RF.to(gate_up_RF.dtype)
