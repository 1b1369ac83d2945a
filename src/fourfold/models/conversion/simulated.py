"""Quantised weights in float32: what a kernel computes from the codes, on any device.

Shapes: T tokens, I input width, O output width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import PackedW4A8, dequantize
from fourfold.quantize.weights import DenseWeight, Encoded, turned

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_TINY = 1e-30


class Int8Codes(NamedTuple):
    """Int8 codes [E, O, I] with float32 scales [E, O]: symmetric, rounded to nearest."""

    codes_EOI: Tensor
    scale_EO: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Codes:
        """The nearest codes of a floating-point weight [O, I] or [E, O, I]."""
        stack = weight.view(-1, *weight.shape[-2:]).float()
        scale = stack.abs().amax(-1) / _LARGEST[torch.int8]
        return cls((stack / scale.clamp_min(_TINY)[..., None]).round().to(torch.int8), scale)


Codes = PackedW4A8 | Int8Codes


def values(codes: Codes) -> Tensor:
    """The weights that codes stand for, float32 [E, O, I]."""
    if isinstance(codes, PackedW4A8):
        return dequantize(codes)
    return codes.codes_EOI.float() * codes.scale_EO[..., None]


class SimulatedWeight(DenseWeight):
    """Float32 weights that codes stand for; activations are turned and rounded as by a kernel."""

    def __init__(self, codes: Codes, turn: Tensor | None, *, stacked: bool) -> None:
        whole = values(codes)
        super().__init__(whole if stacked else whole[0])
        self._turn = turn
        self._dtype = codes.recipe.activations if isinstance(codes, PackedW4A8) else torch.int8

    def encode(self, x_TI: Tensor) -> Encoded:
        x_TI = x_TI.float() if self._turn is None else turned(x_TI.float(), self._turn)
        return (round_rows(x_TI, self._dtype),)


def round_rows(x_TI: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows rounded to 8-bit codes of `dtype`, each with a scale of its own, float32."""
    largest = _LARGEST[dtype]
    scale = x_TI.abs().amax(-1, keepdim=True).clamp_min(_TINY) / largest
    codes = x_TI / scale
    codes = codes.round() if dtype == torch.int8 else codes.to(dtype).float()
    return codes * scale
