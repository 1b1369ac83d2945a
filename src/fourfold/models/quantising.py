"""Turns a model's dense weights into the codes of a precision, one layer after the other.

Weights are rotated first (`rotation`), in float32, then rounded to the nearest codes, so that only
one layer is ever held in full. What stays in floating point (embedding, norms, biases) goes to the
dtype of the activations; routers stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe
from fourfold.models.config import ModelConfig
from fourfold.models.decoder import Block, Decoder
from fourfold.models.layers import Linear
from fourfold.models.precision import Precision
from fourfold.models.rotation import Rotation, input_turn
from fourfold.models.router import Router
from fourfold.quadrants.experts import ExpertWeights
from fourfold.quantize.weights import DenseWeight, Weight, to_w4a8, to_w8a8

RECIPES = {
    Precision.W4A8: W4A8Recipe.INT8_G64,
    Precision.W4A8_FP8: W4A8Recipe.FP8_G128,
}
"""How the FFNs' weights of each 4-bit precision are kept. Attention's projections and the head are
int8 per channel in all: they are a small part of a sparse model and lose most by 4 bits."""


def replace_weights(
    block: Block,
    attention: Callable[[Tensor], Weight],
    ffn: Callable[[Tensor, Tensor | None], Weight],
    device: torch.device,
) -> None:
    """Replaces the dense weights of a layer by codes, in place.

    Args:
        block: its weights may be without storage, if the other arguments only read their shapes.
        attention: makes codes of a weight of attention's projections.
        ffn: makes codes of a weight of an FFN, and of the matrix by which what it reads is turned
            (None: not at all). What a gated FFN's last product reads has outliers of its own.
        device: of the matrices.
    """

    def turn_of(weight: Tensor) -> Tensor | None:
        turn = input_turn(weight.shape[-1])
        return None if turn is None else turn.to(device)

    for name, module in list(block.named_modules()):
        if isinstance(module, Linear) and name.startswith("attention."):
            module.weight = attention(_values(module.weight))
        elif isinstance(module, Linear):
            weight = _values(module.weight)
            module.weight = ffn(weight, turn_of(weight) if name.endswith(".down") else None)
        elif isinstance(module, ExpertWeights):
            down = _values(module.down)
            module.gate_up = ffn(_values(module.gate_up), None)
            module.down = ffn(down, turn_of(down))


class Quantiser:
    """The rotation and the codes of one model."""

    def __init__(self, config: ModelConfig, precision: Precision, device: torch.device) -> None:
        self._rotation = Rotation(config, device)
        self._recipe = RECIPES.get(precision)
        self._device = device
        self._dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def quantise_block(self, block: Block) -> None:
        """Rotates one filled layer and replaces its dense weights, in place."""
        self._rotation.rotate_block(block)
        replace_weights(block, to_w8a8, self._codes, self._device)
        self._settle(block)

    def quantise_ends(self, model: Decoder) -> None:
        """Rotates the embedding and the head, and replaces the head's dense weight."""
        self._rotation.rotate_ends(model)
        model.head.weight = to_w8a8(_values(model.head.weight))
        for part in (model.embedding, model.norm, model.head):
            self._settle(part)

    def _codes(self, weight: Tensor, turn: Tensor | None) -> Weight:
        if self._recipe is None:
            return to_w8a8(weight, turn)
        return to_w4a8(weight, self._recipe, turn)

    def _settle(self, part: nn.Module) -> None:
        for module in part.modules():
            if not isinstance(module, Router):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self._dtype)


def _values(weight: Weight) -> Tensor:
    assert isinstance(weight, DenseWeight)
    return weight.weight
