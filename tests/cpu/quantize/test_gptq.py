"""Calibrated codes against the nearest ones, on the products they are calibrated for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import PackedW4A8, W4A8Recipe, dequantize
from fourfold.quantize.gptq import gptq, inverse_factor
from fourfold.quantize.w4a8 import quantize_w4a8

RECIPES = list(W4A8Recipe)


def inputs(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Correlated rows, as activations are: most of them lies in few directions."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -3, channels)
    mixed = torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
    return (torch.randn(rows, channels, generator=generator) * spread) @ mixed


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def lost(x: Tensor, w: Tensor, packed: PackedW4A8) -> float:
    exact = x @ w.transpose(-1, -2)
    return float((x @ dequantize(packed).transpose(-1, -2) - exact).norm() / exact.norm())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("channels", [96, 256])
def test_products_lose_less_than_by_rounding(recipe: W4A8Recipe, channels: int) -> None:
    x, w = inputs(1500, channels), weight(2, 40, channels)
    packed = gptq(w, (x.T @ x).expand(2, -1, -1), recipe)
    assert packed.recipe is recipe
    assert packed.inputs == channels
    assert lost(x, w, packed) < 0.6 * lost(x, w, quantize_w4a8(w, recipe))


@pytest.mark.parametrize("recipe", [W4A8Recipe.INT8_G64, W4A8Recipe.FP8_G128])
def test_the_layout_is_that_of_rounding(recipe: W4A8Recipe) -> None:
    x, w = inputs(300, 192), weight(24, 192)
    ours, nearest = gptq(w, x.T @ x, recipe), quantize_w4a8(w, recipe)
    for one, other in zip(ours, nearest, strict=True):
        if isinstance(one, Tensor):
            assert isinstance(other, Tensor)
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            assert one.is_contiguous()


def test_experts_are_calibrated_apart() -> None:
    w = weight(2, 24, 128)
    hessians = torch.stack([(x := inputs(400, 128, seed)).T @ x for seed in (2, 3)])
    both = gptq(w, hessians, W4A8Recipe.INT8_G128)
    for expert in range(2):
        alone = gptq(w[expert], hessians[expert], W4A8Recipe.INT8_G128)
        assert torch.equal(alone.packed_EBOJ[0], both.packed_EBOJ[expert])


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_expert_that_saw_nothing_is_rounded(recipe: W4A8Recipe) -> None:
    """Without inputs there is nothing to feed errors back by; its neighbour is not disturbed."""
    x, w = inputs(400, 128), weight(2, 24, 128)
    packed = gptq(w, torch.stack((torch.zeros(128, 128), x.T @ x)), recipe)
    difference = (dequantize(packed)[0] - w[0]).norm() / w[0].norm()
    assert float(difference) < 0.15
    alone = gptq(w[1], x.T @ x, recipe)
    assert torch.equal(packed.packed_EBOJ[1], alone.packed_EBOJ[0])


def test_channels_without_inputs_keep_their_weights() -> None:
    """What calibration never used may be used later."""
    x, w = inputs(400, 128), weight(24, 128)
    x[:, 10:20] = 0.0
    whole = dequantize(gptq(w, x.T @ x, W4A8Recipe.INT8_G64))[0]
    difference = (whole - w)[:, 10:20].norm() / w[:, 10:20].norm()
    assert float(difference) < 0.2


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_fewer_rows_than_channels(rows: int) -> None:
    """A Hessian of low rank: damping makes it definite."""
    x, w = inputs(rows, 128) * 1e3, weight(24, 128)
    packed = gptq(w, x.T @ x, W4A8Recipe.INT8_G128)
    assert bool(dequantize(packed).isfinite().all())
    assert lost(x, w, packed) <= lost(x, w, quantize_w4a8(w, W4A8Recipe.INT8_G128))


def test_the_factor_inverts_the_hessian() -> None:
    x = inputs(500, 64).double()
    hessian = (x.T @ x)[None]
    factor = inverse_factor(hessian).double()[0]
    assert torch.equal(factor, factor.triu())
    mean = hessian[0].diagonal().mean()
    damped = hessian[0] / mean + 0.01 * torch.eye(64)
    torch.testing.assert_close(
        factor.T @ factor @ damped, torch.eye(64).double(), atol=1e-3, rtol=0
    )


def test_a_hessian_that_is_not_definite_is_damped_until_it_is() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.05  # beyond what any inputs make
    assert bool(inverse_factor(hessian[None]).isfinite().all())
