"""The verbs: checked, then Triton on a GPU and the reference anywhere else.

Shapes: T tokens, H query heads, G KV heads, C head width, A = (H + 2 G) C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.rope import reference
from fourfold.kernels.rope.reference import OpenRows


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
    """Splits `qkv_TA` [T, (H + 2 G) C] into q [T, H, C], k and v [T, G, C].

    Each head of q and k is RMS-normed with a weight [C] where one is given, then rotated: halves
    against each other, `x * cos + roll(x, C / 2) * sin`, with the sine's first half negated (as
    `models.layers.Rope` has them; [T, C] of any float dtype). `k_offset_GC` is subtracted from the
    rotated keys, [G, C]. Computed in float32, rounded once to the dtype of `qkv_TA`. C is even; one
    that is no power of two has no kernel. Values are a view of `qkv_TA`, for nothing is done to
    them; a kernel's q and k are contiguous.
    """
    arguments = (qkv_TA, heads, kv_heads, head_width, cos_TC, sin_TC)
    options = (q_norm_weight, k_norm_weight, eps, k_offset_GC)
    _check(*arguments, *options)
    if not qkv_TA.is_cuda or not _has_kernel(head_width):
        return reference.norm_rope(*arguments, *options)
    from fourfold.kernels.rope.triton_rope import launch

    q, k, v = launch(*arguments, *options)
    assert k is not None
    assert v is not None
    return q, k, v


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
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`norm_rope` that also writes each token's keys and values to its open page.

    Token t goes to row `opened.place_T[t]` of the open pages; no two tokens may have the same
    place. With `keep` keys and values come back too, as a chunk of a prompt needs them and as
    `norm_rope` returns them; a token's are the same bits in both places. On a GPU C is a power of
    two. No host synchronisation.
    """
    arguments = (qkv_TA, heads, kv_heads, head_width, cos_TC, sin_TC)
    options = (q_norm_weight, k_norm_weight, eps, k_offset_GC)
    _check(*arguments, *options)
    assert opened.place_T.shape == (len(qkv_TA),)
    assert opened.place_T.dtype == torch.int32
    assert opened.place_T.is_contiguous()
    for rows in (opened.open_k, opened.open_v):
        assert rows.shape[1:] == (kv_heads, head_width)
        assert rows.dtype == qkv_TA.dtype
        assert rows.is_contiguous(), "open pages must be contiguous"
    if not qkv_TA.is_cuda:
        q, k, v = reference.norm_rope_append(*arguments, opened, *options)
        return (q, k, v) if keep else (q, None, None)
    assert _has_kernel(head_width), f"no kernel for heads {head_width} wide"
    from fourfold.kernels.rope.triton_rope import launch

    return launch(*arguments, *options, opened, keep=keep)


def _has_kernel(head_width: int) -> bool:
    return head_width & (head_width - 1) == 0


def _check(
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
) -> None:
    tokens, across = qkv_TA.shape
    assert across == (heads + 2 * kv_heads) * head_width, "the projection has another width"
    assert qkv_TA.stride(1) == 1, "channels must be contiguous"
    assert cos_TC.shape == sin_TC.shape == (tokens, head_width), "angles are [T, C]"
    assert cos_TC.stride(1) == sin_TC.stride(1) == 1, "angles of a token must be contiguous"
    assert head_width % 2 == 0, "heads are turned by halves"
    for weight_C in (q_norm_weight, k_norm_weight):
        assert weight_C is None or weight_C.shape == (head_width,), "a norm's weight is [C]"
    assert k_offset_GC is None or k_offset_GC.shape == (kv_heads, head_width), "offsets are [G, C]"
