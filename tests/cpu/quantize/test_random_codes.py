"""Weights that are drawn as codes stand for random weights of the deviation that was asked for."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe, dequantize
from fourfold.quantize.random_codes import random_int8, random_w4a8

SHAPE = (2, 96, 320)


@pytest.mark.parametrize("recipe", list(W4A8Recipe))
def test_packed(recipe: W4A8Recipe) -> None:
    packed = random_w4a8(SHAPE, recipe, 0.02, torch.Generator().manual_seed(0))
    weight = dequantize(packed)
    assert weight.shape == SHAPE
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean().item()) < 0.003
    again = random_w4a8(SHAPE, recipe, 0.02, torch.Generator().manual_seed(0))
    assert torch.equal(packed.packed_EBOJ, again.packed_EBOJ)


def test_int8() -> None:
    codes, scale = random_int8(SHAPE, 0.02, torch.Generator().manual_seed(0))
    weight = codes * scale[..., None]
    assert weight.shape == SHAPE
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert codes.min() == -127
