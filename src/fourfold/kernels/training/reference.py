"""The verbs in plain PyTorch: what a CPU computes, and the oracle of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_swiglu(gate_up_RF: Tensor, gates_R: Tensor | None = None) -> Tensor:
    """See `fourfold.kernels.training.gated_swiglu`."""
    gate, up = torch.chunk(gate_up_RF.float(), 2, dim=-1)
    hidden_RF = F.silu(gate) * up
    if gates_R is not None:
        hidden_RF = hidden_RF * gates_R[:, None]
    return hidden_RF.to(gate_up_RF.dtype)


def gated_swiglu_backward(
    grad_RF: Tensor, gate_up_RF: Tensor, gates_R: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `fourfold.kernels.training.gated_swiglu_backward`."""
    gate, up = torch.chunk(gate_up_RF.float(), 2, dim=-1)
    grad_RF = grad_RF.float()
    share = gate.sigmoid()
    silu = gate * share
    grad_gates_R: Tensor | None = None
    if gates_R is not None:
        grad_gates_R = (grad_RF * silu * up).sum(-1)
        grad_RF = grad_RF * gates_R[:, None]
    grad_gate = grad_RF * up * (share + silu * (1 - share))
    return torch.cat((grad_gate, grad_RF * silu), -1).to(gate_up_RF.dtype), grad_gates_R


def add_norm(
    stream_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `fourfold.kernels.training.add_norm`."""
    added_TD = stream_TD if delta_TD is None else stream_TD + delta_TD
    unit_TD, _ = _normed(added_TD, eps)
    return (unit_TD * weight_D.float()).to(added_TD.dtype), added_TD


def add_norm_backward(
    grad_normed_TD: Tensor,
    grad_added_TD: Tensor | None,
    added_TD: Tensor,
    weight_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `fourfold.kernels.training.add_norm_backward`."""
    unit_TD, inverse_T1 = _normed(added_TD, eps)
    grad_TD, grad_weight = _norm_backward(grad_normed_TD.float(), unit_TD, inverse_T1, weight_D)
    if grad_added_TD is not None:
        grad_TD = grad_TD + grad_added_TD.float()
    return grad_TD.to(added_TD.dtype), grad_weight


def adamw(
    master: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    rounded: Tensor | None,
    numbers_4: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """See `fourfold.kernels.training.adamw`."""
    scale, rate, of_mean, of_root = numbers_4.unbind()
    grad = grad.float() * scale
    mean.lerp_(grad, 1.0 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    update = mean / square.sqrt().mul_(of_root).add_(eps)
    master.mul_(1.0 - rate * decay).sub_(rate * of_mean * update)
    if rounded is not None:
        rounded.copy_(master)


def sum_rows(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    """See `fourfold.kernels.training.sum_rows`."""
    y_TD = rows_RD[place_TK[:, 0]].float()
    for place_T in place_TK.unbind(1)[1:]:
        y_TD = y_TD + rows_RD[place_T].float()
    return y_TD.to(rows_RD.dtype)


def cross_entropy(logits_SV: Tensor, target_S: Tensor, *, gradient: bool) -> Tensor:
    """See `fourfold.kernels.training.cross_entropy`."""
    live_S = target_S >= 0
    target_S1 = target_S.clamp_min(0)[:, None]
    log_SV = logits_SV.float().log_softmax(-1)
    loss_S = -log_SV.gather(1, target_S1)[:, 0] * live_S
    if gradient:
        grad_SV = log_SV.exp_()
        grad_SV.scatter_add_(1, target_S1, grad_SV.new_full(target_S1.shape, -1.0))
        logits_SV.copy_(grad_SV * live_S[:, None])
    return loss_S


def norm_rope_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv_TA: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `fourfold.kernels.training.norm_rope_backward`."""
    grad_q, grad_k, grad_v = grads
    heads, kv_heads, width = grad_q.shape[1], grad_k.shape[1], grad_q.shape[2]
    qkv = torch.unflatten(qkv_TA, -1, (-1, width))
    q_THC, k_TGC, _ = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    x_q, w_q = _head_backward(grad_q, q_THC, cos_TC, sin_TC, q_norm_weight, eps)
    x_k, w_k = _head_backward(grad_k, k_TGC, cos_TC, sin_TC, k_norm_weight, eps)
    grad_qkv = torch.cat((x_q, x_k, grad_v.float()), 1)
    return grad_qkv.flatten(1).to(qkv_TA.dtype), w_q, w_k


def _head_backward(
    grad_THC: Tensor,
    x_THC: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    weight_C: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    grad_THC = grad_THC.float()
    turned = (grad_THC * sin_TC.float()[:, None]).roll(grad_THC.shape[-1] // 2, -1)
    grad_THC = grad_THC * cos_TC.float()[:, None] + turned
    if weight_C is None:
        return grad_THC, None
    return _norm_backward(grad_THC, *_normed(x_THC, eps), weight_C)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x)` over the last axis and `1 / rms(x)`, float32."""
    inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return x.float() * inverse, inverse


def _norm_backward(
    grad: Tensor, unit: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients, float32, of `unit * weight` for what was normed and for the weight."""
    grad_weight = (grad * unit).flatten(0, -2).sum(0)
    grad = grad * weight.float()
    return inverse * (grad - unit * (grad * unit).mean(-1, keepdim=True)), grad_weight
