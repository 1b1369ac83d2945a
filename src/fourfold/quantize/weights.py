"""A weight matrix in the precision it is served in, and its product with activations.

A layer holds a `Weight` and does not know which kind it is. `DenseWeight` is a plain tensor;
`W8A8Weight` holds int8 codes with one scale per output channel (symmetric round-to-nearest) and
quantises activations per token. `encode` prepares activations once for several products.

Shapes: T tokens, I input width, O output width; leading axes of a weight stack experts' slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.kernels.w8a8_gemm import LIMIT, pack_weight, quantize_per_token, w8a8_gemm

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
    """Int8 weights, for each slot one packed matrix and float32 scales [O]; products are float32.

    A weight that is not stacked has one slot. With `turn`, an orthogonal matrix [b, b], activations
    are turned in blocks of b channels before they are quantised, and the weights were too: that
    spreads outliers which only appear in an activation, where no weight before it can.
    """

    def __init__(
        self, packed: Sequence[Tensor], scales: Sequence[Tensor], turn: Tensor | None
    ) -> None:
        super().__init__()
        self.packed = tuple(packed)
        self.scales = tuple(scales)
        self.turn = turn

    @classmethod
    def quantize(cls, weight: Tensor, turn: Tensor | None = None) -> W8A8Weight:
        """The nearest codes of a floating-point weight [..., O, I]; zero channels have scale 0."""
        stack = weight.float().view(-1, *weight.shape[-2:])
        if turn is not None:
            stack = _turned(stack, turn)
        scale = stack.abs().amax(-1) / LIMIT
        codes = stack / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        packed = [pack_weight(slot) for slot in codes.round_().to(torch.int8)]
        return cls(packed, scale.unbind(), turn)

    def stacked(self) -> W8A8Weight:
        """The same storage as a stack of one."""
        return self

    def encode(self, x_TI: Tensor) -> Encoded:
        return quantize_per_token(x_TI if self.turn is None else _turned(x_TI, self.turn))

    def product(self, encoded: Encoded, slot: int = 0) -> Tensor:
        """`x @ weight.T`, float32 [T, O]; `slot` picks one of stacked weights."""
        codes_TI, scale_T1 = encoded
        return w8a8_gemm(codes_TI, scale_T1, self.packed[slot], self.scales[slot])


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """The last axis turned in blocks of the matrix's width."""
    return (x.view(-1, turn.shape[0]) @ turn).view(x.shape)


Weight = DenseWeight | W8A8Weight
