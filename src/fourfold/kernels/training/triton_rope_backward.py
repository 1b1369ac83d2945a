"""Gradients through rotation and norm of heads, in Triton.

A program takes every so many-th token and adds up what its tokens give the norms' weights in
registers; the sums of all programs are added afterwards, in their order.

Shapes: T tokens, H query heads, G KV heads, C head width, A = (H + 2 G) C.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 1024


@triton.jit
def _heads(
    grad,
    x,
    out,
    weight_a,
    weight_b,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    sum_a,
    sum_b,
    eps,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    ROOM: tl.constexpr,
):
    """All heads of one kind of one token; pointers are the token's. Returns the sums for the
    norm's weight with this token's added."""
    HALF: tl.constexpr = C // 2
    head, low = tl.arange(0, ROOM), tl.arange(0, HALF)
    inside = (head < HEADS)[:, None] & (low < HALF)[None, :]
    place = head[:, None] * C + low[None, :]
    dy_a = tl.load(grad + place, inside, other=0.0).to(tl.float32)
    dy_b = tl.load(grad + place + HALF, inside, other=0.0).to(tl.float32)
    d_a = dy_a * cos_a[None, :] + dy_b * sin_b[None, :]
    d_b = dy_b * cos_b[None, :] + dy_a * sin_a[None, :]
    if NORM:
        a = tl.load(x + place, inside, other=0.0).to(tl.float32)
        b = tl.load(x + place + HALF, inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / C + eps)[:, None]
        a *= inverse
        b *= inverse
        sum_a += tl.sum(d_a * a, 0)
        sum_b += tl.sum(d_b * b, 0)
        d_a *= weight_a[None, :]
        d_b *= weight_b[None, :]
        along = ((tl.sum(d_a * a, 1) + tl.sum(d_b * b, 1)) / C)[:, None]
        d_a = inverse * (d_a - a * along)
        d_b = inverse * (d_b - b * along)
    kind = out.dtype.element_ty
    tl.store(out + place, d_a.to(kind), inside)
    tl.store(out + place + HALF, d_b.to(kind), inside)
    return sum_a, sum_b


@triton.jit(do_not_specialize=["T"])
def _norm_rope_backward_kernel(
    grad_q,
    grad_k,
    grad_v,
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    grad_qkv,
    sums,
    T,
    qkv_stride,
    cos_stride,
    sin_stride,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    H_ROOM: tl.constexpr,
    G_ROOM: tl.constexpr,
):
    HALF: tl.constexpr = C // 2
    A: tl.constexpr = (H + 2 * G) * C
    low = tl.arange(0, HALF)
    q_a, q_b, k_a, k_b = low * 0.0, low * 0.0, low * 0.0, low * 0.0
    if Q_NORM:
        q_a = tl.load(q_weight + low).to(tl.float32)
        q_b = tl.load(q_weight + HALF + low).to(tl.float32)
    if K_NORM:
        k_a = tl.load(k_weight + low).to(tl.float32)
        k_b = tl.load(k_weight + HALF + low).to(tl.float32)
    sum_qa, sum_qb = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    sum_ka, sum_kb = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    for number in range(tl.program_id(0), T, tl.num_programs(0)):
        token = tl.cast(number, tl.int64)
        cos_t, sin_t = cos + token * cos_stride + low, sin + token * sin_stride + low
        cos_a, cos_b = tl.load(cos_t).to(tl.float32), tl.load(cos_t + HALF).to(tl.float32)
        sin_a, sin_b = tl.load(sin_t).to(tl.float32), tl.load(sin_t + HALF).to(tl.float32)
        x, out = qkv + token * qkv_stride, grad_qkv + token * A
        sum_qa, sum_qb = _heads(
            grad_q + token * (H * C), x, out, q_a, q_b, cos_a, cos_b, sin_a, sin_b,
            sum_qa, sum_qb, eps, H, C, Q_NORM, H_ROOM,
        )  # fmt: skip
        sum_ka, sum_kb = _heads(
            grad_k + token * (G * C), x + H * C, out + H * C, k_a, k_b, cos_a, cos_b, sin_a, sin_b,
            sum_ka, sum_kb, eps, G, C, K_NORM, G_ROOM,
        )  # fmt: skip
        channel = tl.arange(0, G_ROOM * C)
        v = tl.load(grad_v + token * (G * C) + channel, channel < G * C)
        tl.store(out + (H + G) * C + channel, v, channel < G * C)
    mine = sums + tl.program_id(0) * (2 * C) + low
    tl.store(mine, sum_qa)
    tl.store(mine + HALF, sum_qb)
    tl.store(mine + C, sum_ka)
    tl.store(mine + C + HALF, sum_kb)


def launch(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv_TA: Tensor,
    cos_TC: Tensor,
    sin_TC: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`norm_rope_backward` on checked arguments."""
    grad_q, grad_k, grad_v = grads
    tokens, heads, width = grad_q.shape
    kv_heads = grad_k.shape[1]
    grad_qkv = torch.empty(qkv_TA.shape, dtype=qkv_TA.dtype, device=qkv_TA.device)
    programs = min(_PROGRAMS, tokens)
    sums = torch.empty((programs, 2, width), dtype=torch.float32, device=qkv_TA.device)
    _norm_rope_backward_kernel[(programs,)](
        grad_q,
        grad_k,
        grad_v,
        qkv_TA,
        cos_TC,
        sin_TC,
        qkv_TA if q_norm_weight is None else q_norm_weight,
        qkv_TA if k_norm_weight is None else k_norm_weight,
        grad_qkv,
        sums,
        tokens,
        qkv_TA.stride(0),
        cos_TC.stride(0),
        sin_TC.stride(0),
        eps,
        H=heads,
        G=kv_heads,
        C=width,
        Q_NORM=q_norm_weight is not None,
        K_NORM=k_norm_weight is not None,
        H_ROOM=triton.next_power_of_2(heads),
        G_ROOM=triton.next_power_of_2(kv_heads),
    )
    of_q, of_k = sums.sum(0)
    return (
        grad_qkv,
        None if q_norm_weight is None else of_q,
        None if k_norm_weight is None else of_k,
    )
