"""Heads normed and rotated, in plain PyTorch: what the CPU computes, and the kernels' oracle.

Shapes: T tokens, H query heads, G KV heads, C head width, A = (H + 2 G) C, S slots of sequences,
N = 64 tokens per page.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OpenRows(NamedTuple):
    """Where keys and values of new tokens are kept until their page is full."""

    open_k: Tensor
    """[S * N, G, C] in the dtype of the tokens, contiguous."""
    open_v: Tensor
    place_T: Tensor
    """The row of the open pages for each token, int32 [T]; negative: none."""


def rope_angles(
    positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a step's positions; see `fourfold.kernels.rope`."""
    angle_TC = positions_T[:, None].float() * frequencies[None]
    cos, sin = angle_TC.cos(), angle_TC.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def norm_rope(
    qkv_TA: Tensor,
    heads: int,
    kv_heads: int,
    head_width: int,
    cos_TC: Tensor,
    sin_TC: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_offset_GC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one product's output; see `fourfold.kernels.rope`."""
    qkv = torch.unflatten(qkv_TA, -1, (-1, head_width))
    if q_norm_weight is None and k_norm_weight is None:
        qk, v_TGC = torch.split(qkv, [heads + kv_heads, kv_heads], dim=1)
        qk = _rotated(qk.float(), cos_TC, sin_TC)
        q_THC, k_TGC = torch.split(qk, [heads, kv_heads], dim=1)
    else:
        q_THC, k_TGC, v_TGC = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        q_THC = _rotated(_normed(q_THC, q_norm_weight, eps), cos_TC, sin_TC)
        k_TGC = _rotated(_normed(k_TGC, k_norm_weight, eps), cos_TC, sin_TC)
    if k_offset_GC is not None:
        k_TGC = k_TGC - k_offset_GC.float()
    return q_THC.to(qkv_TA.dtype), k_TGC.to(qkv_TA.dtype), v_TGC


def norm_rope_append(
    qkv_TA: Tensor,
    heads: int,
    kv_heads: int,
    head_width: int,
    cos_TC: Tensor,
    sin_TC: Tensor,
    opened: OpenRows,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_offset_GC: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and keys and values in their open pages; see `fourfold.kernels.rope`."""
    options = (q_norm_weight, k_norm_weight, eps, k_offset_GC)
    q, k, v = norm_rope(qkv_TA, heads, kv_heads, head_width, cos_TC, sin_TC, *options)
    wanted = opened.place_T >= 0
    places = opened.place_T[wanted].long()
    opened.open_k[places] = k[wanted]
    opened.open_v[places] = v[wanted]
    return q, k, v


def _normed(x_THC: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    x_THC = x_THC.float()
    if weight_C is None:
        return x_THC
    return x_THC * torch.rsqrt(x_THC.square().mean(-1, keepdim=True) + eps) * weight_C.float()


def _rotated(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    cos_T1C, sin_T1C = cos_TC.float()[:, None], sin_TC.float()[:, None]
    return torch.addcmul(x_THC * cos_T1C, x_THC.roll(x_THC.shape[-1] // 2, -1), sin_T1C)
