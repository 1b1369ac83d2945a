"""Packing in one kernel gives the bits that rounding in PyTorch gives."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe
from fourfold.kernels.w4a8_pack import pack_nearest
from fourfold.quantize.w4a8 import quantize_w4a8

GROUPED = [recipe for recipe in W4A8Recipe if recipe.group is not None]


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """With outliers, a row of zeros, rows of one sign, a constant group and tiny rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight.view(-1)[::97] *= 8
    weight[0, 0] = 0
    weight[0, 1] *= 1e-30
    weight[-1, -1] = weight[-1, -1].abs()
    weight[-1, -2, :64] = -0.5
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 128), (2, 20, 320), (3, 5, 64)])
@pytest.mark.parametrize("recipe", GROUPED)
def test_bits_are_those_of_the_reference(
    recipe: W4A8Recipe, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    weight = weights(*shape).to(dtype)
    packed, wanted = pack_nearest(weight, recipe), quantize_w4a8(weight, recipe)
    assert packed[:2] == wanted[:2]
    for ours, theirs in zip(packed[2:], wanted[2:], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
