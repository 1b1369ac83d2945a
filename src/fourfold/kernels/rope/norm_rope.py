"""The verb: checked, then Triton on a GPU and the reference anywhere else.

Shapes: T tokens, H query heads, G KV heads, C head width, A = (H + 2 G) C.
"""

from __future__ import annotations

from torch import Tensor

from fourfold.kernels.rope import reference


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
    rotated keys. Computed in float32, rounded once to the dtype of `qkv_TA`. C is a power of two.
    On a GPU all three are contiguous.
    """
    tokens, across = qkv_TA.shape
    assert across == (heads + 2 * kv_heads) * head_width, "the projection has another width"
    assert qkv_TA.stride(1) == 1, "channels must be contiguous"
    assert cos_TC.shape == sin_TC.shape == (tokens, head_width), "angles are [T, C]"
    assert head_width & (head_width - 1) == 0, "the head width must be a power of two"
    arguments = (qkv_TA, heads, kv_heads, head_width, cos_TC, sin_TC)
    options = (q_norm_weight, k_norm_weight, eps, k_offset_GC)
    if not qkv_TA.is_cuda:
        return reference.norm_rope(*arguments, *options)
    from fourfold.kernels.rope.triton_rope import launch

    return launch(*arguments, *options)
