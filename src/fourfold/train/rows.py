"""Routed rows and back, the FFN's gate, heads turned by their positions, and norms of sums: with
gradients that keep little and are one pass over memory.

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
    add_norm,
    add_norm_backward,
    gated_swiglu,
    gated_swiglu_backward,
    norm_rope_backward,
    sum_rows,
)
from fourfold.models.layers import RMSNorm
from fourfold.quadrants.experts import Delta, combined
from fourfold.quadrants.projection import Projected
from fourfold.quantize.weights import Activations, Weight


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


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed_TD, added_TD = add_norm(stream_TD.contiguous(), delta_TD.contiguous(), weight_D, eps)
        ctx.save_for_backward(added_TD, weight_D)
        ctx.eps = eps
        # The last norm's sum goes nowhere.
        ctx.set_materialize_grads(False)
        return normed_TD, added_TD

    @staticmethod
    def backward(
        ctx: Any, grad_normed: Tensor, grad_added: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        added_TD, weight_D = ctx.saved_tensors
        if grad_added is not None:
            grad_added = grad_added.contiguous()
        grad_TD, of_weight = add_norm_backward(
            grad_normed.contiguous(), grad_added, added_TD, weight_D, ctx.eps
        )
        return grad_TD, grad_TD, of_weight.to(weight_D.dtype), None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        normed_TD, x_TD = add_norm(x_TD.contiguous(), None, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D)
        ctx.eps = eps
        return normed_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, weight_D = ctx.saved_tensors
        grad_TD, of_weight = add_norm_backward(grad_TD.contiguous(), None, x_TD, weight_D, ctx.eps)
        return grad_TD, of_weight.to(weight_D.dtype), None


class TrainedNorm(RMSNorm):
    """A norm of the residual stream whose sum and gradients are one pass each."""

    # Left out of what is compiled: it is one kernel already, of Triton on a GPU.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def add_and_norm(
        self, stream_TD: Tensor, delta: Delta | None, reader: Weight, *, keep: bool
    ) -> tuple[Activations, Tensor]:
        """As `RMSNorm.add_and_norm`."""
        if delta is None:
            normed_TD = _Norm.apply(stream_TD, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return Activations(normed_TD), stream_TD
        normed_TD, stream_TD = _AddNorm.apply(  # type: ignore[no-untyped-call]
            stream_TD, combined(delta), self.weight, self.eps
        )
        return Activations(normed_TD), stream_TD
