"""A weight matrix in the precision it is served in, and its product with activations.

A layer holds a `Weight` and does not know which kind it is: a plain tensor, or codes with scales
whose activations are quantised per token. `encode` prepares activations once for several products.
On a CPU 4-bit codes are expanded to the int8 codes they stand for, so that the sums are those of a
GPU; there they stay packed.

Shapes: T tokens, I input width, O output width; leading axes of a weight stack experts' slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.kernels.cpu_w8a8_gemm import LIMIT, cpu_w8a8_gemm, pack_weight, quantize_per_token
from fourfold.kernels.rows import quantize_rows
from fourfold.kernels.w4a8_gemm import w4a8_gemm, w8a8_gemm
from fourfold.kernels.w4a8_gemm.packing import (
    PackedW4A8,
    W4A8Recipe,
    decode_nibbles,
    padded,
    unpack_nibbles,
)
from fourfold.quantize.w4a8 import quantize_w4a8

Encoded = tuple[Tensor, ...]
"""Activations as a weight's product wants them: tensors that all have the tokens as first axis."""


class Activations(NamedTuple):
    """Rows that a product reads: in floating point, in 8 bits where whoever made them wrote those,
    or both. `dtype` is that of what the rows are part of."""

    rows: Tensor | None
    codes: Encoded | None = None
    made_as: torch.dtype | None = None

    @property
    def kept(self) -> Tensor:
        """The rows in floating point, which must have been kept."""
        assert self.rows is not None
        return self.rows

    @property
    def dtype(self) -> torch.dtype:
        """What products of these rows are kept in."""
        return self.made_as or self.kept.dtype

    def encoded_for(self, weight: Weight) -> Encoded:
        """The rows as a weight's product wants them."""
        return weight.encode(self.kept) if self.codes is None else self.codes


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
    """Int8 weights on a CPU, for each slot one matrix in oneDNN's layout and float32 scales [O];
    products are float32.

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

    def stacked(self) -> W8A8Weight:
        """The same storage as a stack of one."""
        return self

    def encode(self, x_TI: Tensor) -> Encoded:
        return quantize_per_token(x_TI if self.turn is None else turned(x_TI, self.turn))

    def product(self, encoded: Encoded, slot: int = 0) -> Tensor:
        """`x @ weight.T`, float32 [T, O]; `slot` picks one of stacked weights."""
        codes_TI, scale_T1 = encoded
        return cpu_w8a8_gemm(codes_TI, scale_T1, self.packed[slot], self.scales[slot])


class CudaW8A8Weight(nn.Module):
    """Int8 weights [O, I padded to 128] on a GPU with float32 scales [O]; products are bfloat16."""

    def __init__(self, codes_OI: Tensor, scale_O: Tensor) -> None:
        super().__init__()
        self.codes_OI = codes_OI
        self.scale_O = scale_O

    @property
    def activations(self) -> tuple[torch.dtype, int]:
        """The dtype and the padded width of the rows that the product reads."""
        return torch.int8, self.codes_OI.shape[1]

    def encode(self, x_TI: Tensor, *, swiglu: bool = False) -> Encoded:
        """`swiglu` as `quantize_rows` takes it."""
        return tuple(quantize_rows(x_TI, *self.activations, swiglu=swiglu))

    def product(self, encoded: Encoded) -> Tensor:
        """`x @ weight.T`, [T, O]."""
        codes_TI, scale_T = encoded
        return w8a8_gemm(codes_TI, scale_T, self.codes_OI, self.scale_O, out_dtype=torch.bfloat16)


class CudaW4A8Weight(nn.Module):
    """Packed 4-bit weights on a GPU, one or a stack of slots; products are bfloat16. `turn` as in
    `W8A8Weight`."""

    def __init__(self, packed: PackedW4A8, turn: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.turn = turn

    def stacked(self) -> CudaW4A8Weight:
        """The same storage as a stack of one."""
        return self

    @property
    def activations(self) -> tuple[torch.dtype, int]:
        """The dtype and the padded width of the rows that the product reads."""
        return self.packed.recipe.activations, padded(self.packed.inputs)

    def encode(self, x_TI: Tensor, *, swiglu: bool = False) -> Encoded:
        """`swiglu` as `quantize_rows` takes it."""
        return tuple(quantize_rows(x_TI, *self.activations, turn_bb=self.turn, swiglu=swiglu))

    def product(self, encoded: Encoded) -> Tensor:
        """`x @ weight.T`, [T, O], of a weight that is not stacked."""
        codes_TI, scale_T = encoded
        return w4a8_gemm(codes_TI, scale_T, self.packed, out_dtype=torch.bfloat16)


Weight = DenseWeight | W8A8Weight | CudaW8A8Weight | CudaW4A8Weight


def to_w8a8(weight: Tensor, turn: Tensor | None = None) -> W8A8Weight | CudaW8A8Weight:
    """The nearest int8 codes of a floating-point weight [..., O, I]; zero channels have scale 0.

    On a GPU weights are neither stacked nor turned.
    """
    stack = weight.float().view(-1, *weight.shape[-2:])
    if turn is not None:
        stack = turned(stack, turn)
    scale = stack.abs().amax(-1) / LIMIT
    codes = stack / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return from_int8(codes.round_().to(torch.int8), scale, turn)


def from_int8(
    codes_EOI: Tensor, scale_EO: Tensor, turn: Tensor | None = None
) -> W8A8Weight | CudaW8A8Weight:
    """A weight of int8 codes with float32 scales, for the device that they are on. On a GPU weights
    are neither stacked nor turned."""
    if codes_EOI.is_cuda:
        assert len(codes_EOI) == 1
        assert turn is None
        inputs = codes_EOI.shape[-1]
        return CudaW8A8Weight(F.pad(codes_EOI[0], (0, padded(inputs) - inputs)), scale_EO[0])
    return W8A8Weight([pack_weight(slot) for slot in codes_EOI], scale_EO.unbind(), turn)


def to_w4a8(weight: Tensor, recipe: W4A8Recipe, turn: Tensor | None = None) -> Weight:
    """The nearest 4-bit codes of a floating-point weight [..., O, I]."""
    return from_packed(
        quantize_w4a8(weight if turn is None else turned(weight, turn), recipe), turn
    )


def from_packed(packed: PackedW4A8, turn: Tensor | None = None) -> W8A8Weight | CudaW4A8Weight:
    """A weight that was packed already, for the device that its codes are on. On a CPU its recipe
    must be one of INT8."""
    if packed.packed_EBOJ.is_cuda:
        return CudaW4A8Weight(packed, turn)
    assert packed.recipe.activations == torch.int8
    slots = []
    for slot, nibbles in enumerate(packed.packed_EBOJ):
        group = None if packed.group_EGO is None else packed.group_EGO[slot, None]
        codes = decode_nibbles(unpack_nibbles(nibbles[None], packed.recipe), group, packed.recipe)
        slots.append(pack_weight(codes[0, :, : packed.inputs].to(torch.int8)))
    return W8A8Weight(slots, packed.scale_EO.unbind(), turn)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """The last axis turned in blocks of the matrix's width."""
    return (x.view(-1, turn.shape[0]) @ turn).view(x.shape)
