"""Rounding floating-point weights to packed 4-bit codes in one pass on a GPU."""

from fourfold.kernels.w4a8_pack.pack import pack_nearest

__all__ = ["pack_nearest"]
