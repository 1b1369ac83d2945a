"""Activations in 8 bits, one scale a row: alone, or in one pass with the norm before them."""

from fourfold.kernels.rows.quantize import quantize_rows, rms_norm_quantize
from fourfold.kernels.rows.reference import NormedRows, Rows

__all__ = ["NormedRows", "Rows", "quantize_rows", "rms_norm_quantize"]
