"""What a layer hands to attention: a projection, and how queries and keys come of it.

Splitting, norms and rotation are left to the quadrants, which do them on the way to the pages.

Shapes: T tokens, H query heads, G KV heads, C head width, A = (H + 2 G) C.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fourfold.kernels.rope import OpenRows, norm_rope, norm_rope_append


class Projected(NamedTuple):
    """Queries, keys and values of a step's rows in one tensor, as `norm_rope` takes them."""

    qkv_TA: Tensor
    heads: int
    kv_heads: int
    head_width: int
    cos_TC: Tensor
    sin_TC: Tensor
    q_norm_weight: Tensor | None = None
    k_norm_weight: Tensor | None = None
    eps: float = 1e-6
    k_offset_GC: Tensor | None = None

    def rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, C], k and v [T, G, C]: normed and rotated."""
        return norm_rope(*self)

    def rotated_into(
        self, opened: OpenRows, *, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same; keys and values go to their open pages, and come back too only with `keep`."""
        return norm_rope_append(*self[:6], opened, *self[6:], keep=keep)
