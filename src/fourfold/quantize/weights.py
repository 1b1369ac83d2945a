"""A weight matrix in the precision it is served in, and its product with activations.

A layer holds a `Weight` and does not know which kind it is. `DenseWeight` is a plain tensor;
`W8A8Weight` holds int8 codes with one scale per output channel (symmetric round-to-nearest) and
quantises activations per token. `encode` prepares activations once for several products.

Shapes: T tokens, I input width, O output width; leading axes of a weight stack experts' slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.kernels.w8a8_gemm import LIMIT, quantize_per_token, w8a8_gemm

Encoded = tuple[Tensor, ...]
"""Activations as a weight's product wants them: tensors that all have the tokens as first axis."""


class DenseWeight(nn.Module):
    """Weights [..., O, I] in a floating-point dtype."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def stacked(self) -> DenseWeight:
        """The same storage with one leading axis more, as a stack of one."""
        return DenseWeight(self.weight[None])

    def encode(self, x_TI: Tensor) -> Encoded:
        return (x_TI,)

    def product(self, encoded: Encoded, slot: int | None = None) -> Tensor:
        """`x @ weight.T`, [T, O]; `slot` picks one of stacked weights."""
        return F.linear(encoded[0], self.weight if slot is None else self.weight[slot])


class W8A8Weight(nn.Module):
    """Int8 codes [..., O, I] with float32 scales [..., O]; products are float32."""

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @classmethod
    def quantize(cls, weight: Tensor) -> W8A8Weight:
        """The nearest codes of a floating-point weight; an all-zero channel has scale 0."""
        weight = weight.float()
        scale = weight.abs().amax(-1) / LIMIT
        codes = weight / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        return cls(codes.round_().to(torch.int8), scale)

    def stacked(self) -> W8A8Weight:
        """The same storage with one leading axis more, as a stack of one."""
        return W8A8Weight(self.codes[None], self.scale[None])

    def encode(self, x_TI: Tensor) -> Encoded:
        return quantize_per_token(x_TI)

    def product(self, encoded: Encoded, slot: int | None = None) -> Tensor:
        """`x @ weight.T`, float32 [T, O]; `slot` picks one of stacked weights."""
        codes_TI, scale_T1 = encoded
        if slot is None:
            return w8a8_gemm(codes_TI, scale_T1, self.codes, self.scale)
        return w8a8_gemm(codes_TI, scale_T1, self.codes[slot], self.scale[slot])


Weight = DenseWeight | W8A8Weight
