"""Random weights for models that are only measured: codes where a precision has codes.

Weights are drawn as they will be served, because rotating and rounding numbers that mean nothing
takes the longest part of a start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe
from fourfold.models.decoder import Decoder
from fourfold.models.filling import DEVIATION
from fourfold.models.layers import RMSNorm
from fourfold.models.quantising import replace_weights
from fourfold.models.router import Router
from fourfold.quantize.random_codes import random_int8, random_w4a8
from fourfold.quantize.weights import Weight, from_int8, from_packed


class RandomCodes:
    """Draws the weights of a quantised model that has no storage yet; the same on every start.

    `recipe` is that of 4-bit weights, None where all codes are int8.
    """

    def __init__(self, model: Decoder, recipe: W4A8Recipe | None, device: torch.device) -> None:
        self._model, self._recipe, self._device = model, recipe, device
        self._dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._generator = torch.Generator(device).manual_seed(0)

    def fill_ends(self) -> None:
        model = self._model
        model.head.weight = self._int8(model.embedding.weight)
        for part in (model.embedding, model.norm, model.head):
            self._fill(part)

    def fill_layer(self, layer: int) -> None:
        block = self._model.blocks[layer]
        replace_weights(block, self._int8, self._codes, self._device)
        self._fill(block)

    def _int8(self, weight: Tensor) -> Weight:
        return from_int8(*random_int8(_stack(weight), DEVIATION, self._generator))

    def _codes(self, weight: Tensor, turn: Tensor | None) -> Weight:
        if self._recipe is None:
            codes = random_int8(_stack(weight), DEVIATION, self._generator)
            return from_int8(*codes, turn)
        packed = random_w4a8(_stack(weight), self._recipe, DEVIATION, self._generator)
        return from_packed(packed, turn)

    def _fill(self, part: nn.Module) -> None:
        for module in part.modules():
            dtype = torch.float32 if isinstance(module, Router) else self._dtype
            for name, parameter in list(module.named_parameters(recurse=False)):
                data = torch.empty(parameter.shape, dtype=dtype, device=self._device)
                if isinstance(module, RMSNorm):
                    data.fill_(1.0)
                else:
                    data.normal_(0.0, DEVIATION, generator=self._generator)
                setattr(module, name, nn.Parameter(data, requires_grad=False))


def _stack(weight: Tensor) -> tuple[int, int, int]:
    """The shape of a weight as a stack of one or more."""
    outputs, inputs = weight.shape[-2:]
    return weight.shape[0] if weight.dim() == 3 else 1, outputs, inputs
