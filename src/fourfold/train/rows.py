"""Routed rows and back, the FFN's gate, and heads turned by their positions: with gradients that
keep little and are one pass over memory.

Spreading tokens to rows and collecting rows to tokens are each other's gradient.

Shapes: T tokens, D width, F FFN width, K choices of a token, R = T K rows, H query heads, G KV
heads, C head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourfold.kernels.rope import norm_rope
from fourfold.kernels.training import (
    gated_swiglu,
    gated_swiglu_backward,
    norm_rope_backward,
    sum_rows,
)
from fourfold.quadrants.projection import Projected


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return sum_rows(x_TD.contiguous(), token_R[:, None])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return sum_rows(grad_RD.contiguous(), place_TK), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return sum_rows(rows_RD.contiguous(), place_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return sum_rows(grad_TD.contiguous(), token_R[:, None]), None, None


def spread_rows(x_TD: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
    """Row r is token `token_R[r]`, [R, D]; `place_TK` says where the rows of each token are."""
    rows_RD: Tensor = _Spread.apply(x_TD, token_R, place_TK)  # type: ignore[no-untyped-call]
    return rows_RD


def collect_rows(rows_RD: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
    """The sum over each token's rows, in the order of its choices, [T, D]."""
    x_TD: Tensor = _Collect.apply(rows_RD, token_R, place_TK)  # type: ignore[no-untyped-call]
    return x_TD


def inverse_of(order_R: Tensor) -> Tensor:
    """Where each of the numbers in an order stands in it."""
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return place_R


def permuted(rows: Tensor, order_R: Tensor, place_R: Tensor) -> Tensor:
    """The rows in another order, each once; `place_R` is the order's inverse."""
    return spread_rows(rows, order_R, place_R[:, None])


class _GatedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_RF: Tensor, gates_R: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up_RF, gates_R)
        return gated_swiglu(gate_up_RF, gates_R)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor | None]:
        return gated_swiglu_backward(grad_RF.contiguous(), *ctx.saved_tensors)


# Left out of what is compiled: it is one kernel already, of Triton on a GPU.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def trained_swiglu(gate_up_RF: Tensor, gates_R: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` times the row's gate, in the dtype of the rows; [R, 2F] -> [R, F]."""
    hidden_RF: Tensor = _GatedSwiglu.apply(  # type: ignore[no-untyped-call]
        gate_up_RF.contiguous(), gates_R
    )
    return hidden_RF


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Projected,
        qkv_TA: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos_TC, sin_TC = projected.cos_TC, projected.sin_TC
        ctx.save_for_backward(qkv_TA, cos_TC, sin_TC, q_weight, k_weight)
        ctx.eps = projected.eps
        q, k, v = norm_rope(*projected)
        return q, k, v.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor | None, Tensor | None]:
        q, k, v = (grad.contiguous() for grad in grads)
        qkv_TA, cos_TC, sin_TC, q_weight, k_weight = ctx.saved_tensors
        grad_TA, of_q, of_k = norm_rope_backward(
            (q, k, v), qkv_TA, cos_TC, sin_TC, q_weight, k_weight, ctx.eps
        )
        return (
            None,
            grad_TA,
            None if of_q is None else of_q.to(q_weight.dtype),
            None if of_k is None else of_k.to(k_weight.dtype),
        )


def rotated(projected: Projected) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, C], k and v [T, G, C] of a projection whose keys have no offset."""
    assert projected.k_offset_GC is None
    weights = (projected.q_norm_weight, projected.k_norm_weight)
    heads: tuple[Tensor, Tensor, Tensor] = _NormRope.apply(  # type: ignore[no-untyped-call]
        projected, projected.qkv_TA, *weights
    )
    return heads
