"""Weights in the precision they are served in, on a CPU: 4-bit codes multiply as what they stand
for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe, dequantize
from fourfold.models.rotation import input_turn
from fourfold.quantize.w4a8 import quantize_w4a8
from fourfold.quantize.weights import Activations, from_packed, to_w4a8, to_w8a8, turned

INT8 = [recipe for recipe in W4A8Recipe if recipe.activations == torch.int8]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("recipe", INT8)
@pytest.mark.parametrize("inputs", [128, 200, 576])
def test_packed_codes_multiply_as_what_they_stand_for(recipe: W4A8Recipe, inputs: int) -> None:
    packed = quantize_w4a8(random(3, 48, inputs), recipe)
    weight = from_packed(packed)
    x = random(7, inputs, seed=1)
    exact = F.linear(x, dequantize(packed)[2])
    out = weight.product(weight.encode(x), 2)
    assert (out - exact).norm() / exact.norm() < 0.01  # what 8-bit activations cost


@pytest.mark.parametrize("recipe", INT8)
def test_a_turn_cancels(recipe: W4A8Recipe) -> None:
    """Turned weights and turned activations: the product of neither turned."""
    turn = input_turn(256)
    w, x = random(64, 256), random(5, 256, seed=1)
    packed = quantize_w4a8(turned(w, turn), recipe)
    weight = to_w4a8(w, recipe, turn)
    exact = F.linear(turned(x, turn), dequantize(packed)[0])
    out = weight.product(weight.encode(x))
    assert (out - exact).norm() / exact.norm() < 0.01


def test_more_bits_and_smaller_groups_are_closer() -> None:
    w, x = random(64, 512), random(9, 512, seed=1)
    w[:, ::97] *= 4
    exact = F.linear(x, w)
    kinds = [
        to_w4a8(w, W4A8Recipe.INT8_CHANNEL),
        to_w4a8(w, W4A8Recipe.INT8_G128),
        to_w4a8(w, W4A8Recipe.INT8_G64),
        to_w8a8(w),
    ]
    errors = [(kind.product(kind.encode(x)) - exact).norm() for kind in kinds]
    assert errors == sorted(errors, reverse=True)


def test_rows_that_were_coded_already_are_not_coded_again() -> None:
    weight = to_w8a8(random(16, 64))
    x = random(3, 64, seed=1)
    coded = Activations(None, weight.encode(x), x.dtype)
    again = Activations(x)
    for ours, theirs in zip(coded.encoded_for(weight), again.encoded_for(weight), strict=True):
        assert torch.equal(ours, theirs)
    assert coded.dtype == again.dtype == torch.float32
