"""Rounding weights to 4-bit grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import (
    PackedW4A8,
    W4A8Recipe,
    decode_nibbles,
    dequantize,
    unpack_nibbles,
)
from fourfold.quantize.w4a8 import fit_groups, quantize_w4a8, round_to_grid

RECIPES = list(W4A8Recipe)
GROUPED = [recipe for recipe in RECIPES if recipe.group is not None]


def weights(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[:-1], generator=generator)[
        ..., None
    ].add(0.05)


def codes(packed: PackedW4A8) -> Tensor:
    return decode_nibbles(
        unpack_nibbles(packed.packed_EBOJ, packed.recipe), packed.group_EGO, packed.recipe
    )


def error(weight: Tensor, packed: PackedW4A8) -> float:
    return float((dequantize(packed) - weight).norm() / weight.norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_rounding_loses_what_four_bits_lose(recipe: W4A8Recipe) -> None:
    """Sixteen levels lose a tenth of normal weights; fewer scales or powers of two more."""
    weight = weights(2, 96, 256)
    assert 0.05 < error(weight, quantize_w4a8(weight, recipe)) < 0.14


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("inputs", [64, 128, 192, 130])
def test_any_width_and_odd_values(recipe: W4A8Recipe, inputs: int) -> None:
    weight = weights(1, 16, inputs)
    weight[0, 0] = 0.0
    weight[0, 1] = 3.0
    weight[0, 2] = -1e-20
    weight[0, 3, 5] = 1e4
    weight[0, 4, ::2] = 0.0
    packed = quantize_w4a8(weight, recipe)
    whole = dequantize(packed)
    assert whole.shape == weight.shape
    assert bool(whole.isfinite().all())
    assert float(whole[0, 0].abs().max()) < 1e-25
    torch.testing.assert_close(whole[0, 1], weight[0, 1], rtol=0.08, atol=0)
    torch.testing.assert_close(whole[0, 3, 5], weight[0, 3, 5], rtol=0.08, atol=0)


@pytest.mark.parametrize("recipe", [r for r in GROUPED if r.activations == torch.int8])
def test_codes_stay_within_eight_bits(recipe: W4A8Recipe) -> None:
    """Also of weights that calibration moved out of the range their group was fitted to."""
    generator = torch.Generator().manual_seed(3)
    scaled = (torch.rand(1, 64, 4, 32, generator=generator) * 2 - 1) * 119
    scaled[..., 0] = 119
    scaled[0, 1] = -119
    group = fit_groups(scaled, recipe)
    assert group is not None
    moved = scaled + torch.randn(scaled.shape, generator=generator) * 60
    nibbles = round_to_grid(moved, group[..., None], recipe)
    step, offset = (group & 255).int(), ((group >> 8) & 255).int()
    code = nibbles.int() * step[..., None] + offset[..., None] - 128
    assert int(nibbles.max()) <= 15
    assert int(code.min()) >= -128
    assert int(code.max()) <= 127


@pytest.mark.parametrize("recipe", GROUPED)
def test_important_channels_are_fitted_better(recipe: W4A8Recipe) -> None:
    scaled = weights(1, 64, 1, recipe.group or 0, seed=4) * 30
    importance = torch.full((1, 1, recipe.group or 0), 1e-4)
    importance[..., :4] = 1.0

    def lost(group: Tensor | None) -> float:
        assert group is not None
        nibbles = round_to_grid(scaled, group[..., None], recipe).flatten(-2)
        whole = decode_nibbles(nibbles, group.transpose(1, 2), recipe).view_as(scaled)
        return float((whole - scaled)[..., :4].square().sum())

    assert lost(fit_groups(scaled, recipe, importance)) < lost(fit_groups(scaled, recipe))
