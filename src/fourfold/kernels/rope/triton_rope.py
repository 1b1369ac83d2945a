"""Heads normed and rotated, in Triton: each block takes some heads of one kind of one token.

The halves of a head are loaded apart, so that rotating them against each other needs no exchange
between threads. Blocks of queries, keys and values branch apart: with the kinds side by side in a
block and selected by element, arithmetic took longer than memory. Queries and keys leave through
one pointer, as parts of one allocation; keys may go to open pages as well, or only there. Values
stay as they are: they are only read where they go to open pages.

Shapes: T tokens, H query heads, G KV heads, C head width, A = (H + 2 G) C.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.rope.choose import choose_tile
from fourfold.kernels.rope.reference import OpenRows


@triton.jit
def _turn(
    x_ptr,
    out_ptr,
    open_ptr,
    opened,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    weight_ptr,
    offset_ptr,
    first_head,
    eps,
    KIND: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    KEEP: tl.constexpr,
    APPEND: tl.constexpr,
    HEADS: tl.constexpr,
):
    """HEADS heads from `first_head` on, of KIND that the token has; pointers are the token's."""
    HALF: tl.constexpr = C // 2
    head, low = first_head + tl.arange(0, HEADS), tl.arange(0, HALF)
    inside = (head < KIND)[:, None] & (low < HALF)[None, :]
    place = head[:, None] * C + low[None, :]
    stored_a = tl.load(x_ptr + place, mask=inside, other=0.0)
    stored_b = tl.load(x_ptr + place + HALF, mask=inside, other=0.0)
    a, b = stored_a.to(tl.float32), stored_b.to(tl.float32)
    if NORM:
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / C + eps)[:, None]
        a = a * inverse * tl.load(weight_ptr + low).to(tl.float32)[None, :]
        b = b * inverse * tl.load(weight_ptr + HALF + low).to(tl.float32)[None, :]
    turned_a, turned_b = a * cos_a + b * sin_a, b * cos_b + a * sin_b
    if OFFSET:
        turned_a -= tl.load(offset_ptr + place, mask=inside, other=0.0).to(tl.float32)
        turned_b -= tl.load(offset_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(out_ptr + place, turned_a.to(stored_a.dtype), mask=inside)
        tl.store(out_ptr + place + HALF, turned_b.to(stored_b.dtype), mask=inside)
    if APPEND:
        tl.store(open_ptr + place, turned_a.to(stored_a.dtype), mask=inside & opened)
        tl.store(open_ptr + place + HALF, turned_b.to(stored_b.dtype), mask=inside & opened)


@triton.jit
def _norm_rope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    offset_ptr,
    out_ptr,
    open_k_ptr,
    open_v_ptr,
    place_ptr,
    tokens,
    qkv_stride,
    cos_stride,
    sin_stride,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    KEEP: tl.constexpr,
    APPEND: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`KEEP`: keys are written beside the queries; `APPEND`: keys and values go to open pages.
    `EARLY`: the next kernel may start beside this one (programmatic dependent launch)."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    Q_BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    K_BLOCKS: tl.constexpr = (G + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    all_tokens = tl.cast(tokens, tl.int64)
    x = qkv_ptr + token * qkv_stride
    q_out = out_ptr + token * (H * C)
    k_out = out_ptr + all_tokens * (H * C) + token * (G * C)
    open_k, open_v, opened = open_k_ptr, open_v_ptr, False
    if APPEND:
        place = tl.load(place_ptr + token).to(tl.int64)
        opened = place >= 0
        open_k, open_v = open_k_ptr + place * (G * C), open_v_ptr + place * (G * C)
    low = tl.arange(0, C // 2)
    cos, sin = cos_ptr + token * cos_stride + low, sin_ptr + token * sin_stride + low
    cos_a = tl.load(cos).to(tl.float32)[None, :]
    cos_b = tl.load(cos + C // 2).to(tl.float32)[None, :]
    sin_a = tl.load(sin).to(tl.float32)[None, :]
    sin_b = tl.load(sin + C // 2).to(tl.float32)[None, :]
    BLOCKS: tl.constexpr = Q_BLOCKS + (2 if APPEND else 1) * K_BLOCKS
    for block in range(tl.program_id(1), BLOCKS, tl.num_programs(1)):
        if block < Q_BLOCKS:
            _turn(
                x, q_out, open_k, opened, cos_a, cos_b, sin_a, sin_b, q_weight_ptr, offset_ptr,
                block * HEADS, eps, H, C, Q_NORM, False, True, False, HEADS,
            )  # fmt: skip
        elif block < Q_BLOCKS + K_BLOCKS:
            first = (block - Q_BLOCKS) * HEADS
            _turn(
                x + H * C, k_out, open_k, opened, cos_a, cos_b, sin_a, sin_b, k_weight_ptr,
                offset_ptr, first, eps, G, C, K_NORM, OFFSET, KEEP, APPEND, HEADS,
            )  # fmt: skip
        else:
            first = (block - Q_BLOCKS - K_BLOCKS) * (HEADS * C)
            channel = first + tl.arange(0, HEADS * C)
            inside = (channel < G * C) & opened
            tl.store(open_v + channel, tl.load(x + (H + G) * C + channel, inside), inside)


def launch(
    qkv_TA: Tensor,
    heads: int,
    kv_heads: int,
    head_width: int,
    cos_TC: Tensor,
    sin_TC: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
    k_offset_GC: Tensor | None,
    opened: OpenRows | None = None,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`norm_rope`, or with `opened` `norm_rope_append`, on checked arguments."""
    tokens = len(qkv_TA)
    sizes = [tokens * heads * head_width] + [tokens * kv_heads * head_width] * keep
    out = torch.empty(sum(sizes), dtype=qkv_TA.dtype, device=qkv_TA.device)
    if tokens > 0:
        tile = choose_tile(tokens, heads, kv_heads, values=opened is not None)
        early = overlaps_launches(qkv_TA.device)
        open_k, open_v, place_T = (qkv_TA, qkv_TA, qkv_TA) if opened is None else opened
        _norm_rope_kernel[(tokens, tile.blocks)](
            qkv_TA,
            cos_TC,
            sin_TC,
            _given(q_norm_weight, qkv_TA),
            _given(k_norm_weight, qkv_TA),
            _given(k_offset_GC, qkv_TA),
            out,
            open_k,
            open_v,
            place_T,
            tokens,
            qkv_TA.stride(0),
            cos_TC.stride(0),
            sin_TC.stride(0),
            eps,
            H=heads,
            G=kv_heads,
            C=head_width,
            Q_NORM=q_norm_weight is not None,
            K_NORM=k_norm_weight is not None,
            OFFSET=k_offset_GC is not None,
            KEEP=keep,
            APPEND=opened is not None,
            HEADS=tile.heads,
            EARLY=early,
            num_warps=tile.warps,
            launch_pdl=early,
        )
    q, *k = out.split(sizes)
    q_THC = q.view(tokens, heads, head_width)
    if not keep:
        return q_THC, None, None
    v_TGC = qkv_TA[:, (heads + kv_heads) * head_width :].unflatten(-1, (kv_heads, head_width))
    return q_THC, k[0].view(v_TGC.shape), v_TGC


def _given(option: Tensor | None, instead: Tensor) -> Tensor:
    """What a kernel that does not read an option is handed in its place."""
    return instead if option is None else option.contiguous()
