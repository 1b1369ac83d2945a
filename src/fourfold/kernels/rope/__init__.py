"""Queries and keys normed and rotated by their positions, in one pass over the projection."""

from fourfold.kernels.rope.norm_rope import norm_rope

__all__ = ["norm_rope"]
