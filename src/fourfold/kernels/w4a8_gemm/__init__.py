"""Products of 8-bit activations and 4-bit weights."""

from fourfold.kernels.w4a8_gemm.gemm import grouped_w4a8_gemm, w4a8_gemm, w8a8_gemm

__all__ = ["grouped_w4a8_gemm", "w4a8_gemm", "w8a8_gemm"]
