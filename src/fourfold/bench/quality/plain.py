"""A served layer in plain float32: what its codes stand for, and activations rounded as it does."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.kernels.cpu_w8a8_gemm import ZERO_POINT, cpu_w8a8_gemm
from fourfold.models.conversion.simulated import Codes, Int8Codes, SimulatedWeight
from fourfold.models.layers import Linear
from fourfold.models.router import Router
from fourfold.quadrants.experts import ExpertWeights
from fourfold.quantize.weights import (
    CudaW4A8Weight,
    CudaW8A8Weight,
    Encoded,
    W8A8Weight,
    Weight,
)

Part = TypeVar("Part", bound=nn.Module)


def in_plain_float32(part: Part) -> Part:
    """A copy of a part of a quantised model whose products are float32 ones, on the same device."""
    # Weights packed for a CPU cannot be copied, and are replaced anyhow.
    kept: dict[int, object] = {
        id(module): module for module in part.modules() if isinstance(module, W8A8Weight)
    }
    part = copy.deepcopy(part, kept)
    for module in list(part.modules()):
        if isinstance(module, Linear):
            module.weight = _simulated(module.weight, stacked=False)
        elif isinstance(module, ExpertWeights):
            module.gate_up = _simulated(module.gate_up, stacked=True)
            module.down = _simulated(module.down, stacked=True)
    return cast(part, torch.float32)


def cast(part: Part, dtype: torch.dtype) -> Part:
    """Turns a part of a model to a dtype in place, but for routers, which stay in float32."""
    for module in part.modules():
        if not isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return part


def codes_of(weight: Weight) -> Codes:
    """The codes of a quantised weight, on its device; int8 weights on a GPU keep their padding."""
    if isinstance(weight, CudaW4A8Weight):
        return weight.packed
    if isinstance(weight, CudaW8A8Weight):
        return Int8Codes(weight.codes_OI[None], weight.scale_O[None])
    assert isinstance(weight, W8A8Weight)
    slots = [
        _unpacked(packed, scale) for packed, scale in zip(weight.packed, weight.scales, strict=True)
    ]
    return Int8Codes(torch.stack(slots), torch.stack(weight.scales))


class _PaddedWeight(SimulatedWeight):
    """One whose inputs are padded with zeros."""

    def encode(self, x_TI: Tensor) -> Encoded:
        return super().encode(F.pad(x_TI, (0, self.weight.shape[-1] - x_TI.shape[-1])))


def _simulated(weight: Weight, *, stacked: bool) -> SimulatedWeight:
    if isinstance(weight, CudaW8A8Weight):
        return _PaddedWeight(codes_of(weight), None, stacked=stacked)
    assert isinstance(weight, CudaW4A8Weight | W8A8Weight)
    return SimulatedWeight(codes_of(weight), weight.turn, stacked=stacked)


def _unpacked(packed: Tensor, scale_O: Tensor) -> Tensor:
    """Int8 codes [O, I] of a weight whose layout is opaque: its product with unit rows."""
    inputs = packed.numel() // len(scale_O)
    unit = ZERO_POINT + torch.eye(inputs, dtype=torch.uint8)
    ones_I1, ones_O = torch.ones(inputs, 1), torch.ones_like(scale_O)
    return cpu_w8a8_gemm(unit, ones_I1, packed, ones_O).T.round().to(torch.int8)
