"""Queries and keys normed and rotated by their positions, in one pass over the projection; and the
angles of those positions."""

from fourfold.kernels.rope.angles import rope_angles
from fourfold.kernels.rope.norm_rope import norm_rope, norm_rope_append
from fourfold.kernels.rope.reference import OpenRows

__all__ = ["OpenRows", "norm_rope", "norm_rope_append", "rope_angles"]
