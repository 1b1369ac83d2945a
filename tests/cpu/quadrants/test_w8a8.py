"""8-bit weights and activations: exact where exact is promised, close where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.cpu_w8a8_gemm import (
    LIMIT,
    ZERO_POINT,
    cpu_w8a8_gemm,
    exact_on_cpu,
    pack_weight,
    quantize_per_token,
)
from fourfold.models.rotation import input_turn
from fourfold.quantize.weights import W8A8Weight, to_w8a8

NEAREST = 0.5001  # of a step; the rest is for float32 roundings next to a half
SHAPES = [(1, 64, 1), (2, 65, 7), (5, 255, 64), (33, 1024, 100), (200, 64, 33), (3, 8192, 16)]
shapes = pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)


def random_values(*shape: int, seed: int = 0, spread: bool = True) -> Tensor:
    """Normal values, rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * (10 ** torch.linspace(-3, 3, shape[-2]))[:, None] if spread else values


def test_whether_products_are_exact_is_known() -> None:
    assert isinstance(exact_on_cpu(), bool)


def test_codes_are_the_nearest() -> None:
    x_TI = random_values(50, 37)
    codes, scale = quantize_per_token(x_TI)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.uint8, torch.float32, (50, 1))
    assert int(codes.min()) >= ZERO_POINT - LIMIT
    assert int(codes.max()) <= ZERO_POINT + LIMIT
    back = (codes.double() - ZERO_POINT) * scale.double()
    assert bool(((x_TI.double() - back).abs() <= scale.double() * NEAREST).all())
    peaks = (codes.int() - ZERO_POINT).abs().amax(-1)
    assert peaks.tolist() == [LIMIT] * 50, "the largest value of a row has the largest code"


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 1.5e38, -3e38])
def test_rows_of_extreme_values_have_finite_codes(value: float) -> None:
    codes, scale = quantize_per_token(torch.tensor([[value, 0.0, -value, value]]))
    back = (codes.double() - ZERO_POINT) * scale.double()
    assert bool(scale.isfinite().all())
    wanted = torch.tensor([[value, 0.0, -value, value]], dtype=torch.float64)
    torch.testing.assert_close(back, wanted, rtol=1e-2, atol=1e-38)


def test_weights_are_the_nearest_codes() -> None:
    """Products with one-hot tokens give the weights back, a column each."""
    w = random_values(50, 37)
    weight = to_w8a8(w)
    back = weight.product(weight.encode(torch.eye(37))).T.double()
    step = w.double().abs().amax(-1, keepdim=True) / LIMIT
    assert bool(((w.double() - back).abs() <= step * NEAREST).all())


@shapes
def test_sums_are_exact(tokens: int, inputs: int, outputs: int) -> None:
    """Also where almost everything cancels, or every product has the largest size."""
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randint(-LIMIT, LIMIT + 1, (outputs, inputs), generator=generator).char()
    codes = torch.randint(1, 256, (tokens, inputs), generator=generator).byte()
    weight[0], codes[0] = LIMIT, ZERO_POINT
    codes[0, 0] = ZERO_POINT + 1
    codes[-1, 1:] = ZERO_POINT + LIMIT
    sums = (codes.long() - ZERO_POINT) @ weight.long().T
    packed = pack_weight(weight)
    out = cpu_w8a8_gemm(codes, torch.ones(tokens, 1), packed, torch.ones(outputs))
    # Without VNNI float32 adds the products, exactly as long as no sum needs more than its bits.
    exact = exact_on_cpu() or inputs * LIMIT**2 < 2**24
    rtol, atol = (0.0, 0.0) if exact else (1e-4, inputs)
    torch.testing.assert_close(out, sums.float(), rtol=rtol, atol=atol)


@shapes
def test_products_stay_within_the_rounding_of_codes(tokens: int, inputs: int, outputs: int) -> None:
    """|x w - x' w'| <= |x| sw/2 + |w| sx/2 + sx sw/4, summed over the inputs."""
    x, w = random_values(tokens, inputs, seed=1), random_values(outputs, inputs, seed=2)
    weight = to_w8a8(w)
    out = weight.product(weight.encode(x))
    assert (out.dtype, out.shape) == (torch.float32, (tokens, outputs))
    x, w = x.double(), w.double()
    half_x, half_w = x.abs().amax(-1)[:, None] / LIMIT / 2, w.abs().amax(-1) / LIMIT / 2
    bound = x.abs().sum(-1)[:, None] * half_w + w.abs().sum(-1) * half_x + inputs * half_x * half_w
    assert bool(((out - x @ w.T).abs() <= bound * (1 + 1e-4)).all())


@shapes
def test_bits_do_not_depend_on_the_batch(tokens: int, inputs: int, outputs: int) -> None:
    """Nor on the threads that share the work."""
    x = random_values(tokens, inputs)
    weight = to_w8a8(random_values(outputs, inputs, seed=3))
    torch.set_num_threads(2)
    whole = weight.product(weight.encode(x))
    torch.set_num_threads(1)
    for start, end in ((0, 1), (tokens - 1, tokens), (tokens // 3, tokens // 3 + 2)):
        assert torch.equal(weight.product(weight.encode(x[start:end])), whole[start:end])


def test_turning_loses_nothing_and_spreads_outliers() -> None:
    x, w = random_values(40, 256, spread=False), random_values(30, 256, seed=2, spread=False)
    x[:, 7::64] *= 50
    wanted = x.double() @ w.double().T

    def off(weight: W8A8Weight) -> float:
        error = weight.product(weight.encode(x)) - wanted
        return float(error.norm() / wanted.norm())

    plain, turned = off(to_w8a8(w)), off(to_w8a8(w, input_turn(256)))
    assert turned < 0.02
    assert turned < plain


def test_stacked_weights_hold_one_matrix_a_slot() -> None:
    stack = torch.stack([random_values(10, 24, seed=s, spread=False) for s in range(3)])
    x = random_values(4, 24)
    weight = to_w8a8(stack)
    encoded = weight.encode(x)
    for slot in range(3):
        alone = to_w8a8(stack[slot])
        assert torch.equal(weight.product(encoded, slot), alone.product(encoded))
        assert torch.equal(alone.stacked().product(encoded, 0), alone.product(encoded))


def test_zeros_stay_zero() -> None:
    """A token of zeros and a channel of zeros have no scale to divide by."""
    x, w = random_values(3, 16, spread=False), random_values(5, 16, spread=False)
    x[1], w[2] = 0.0, 0.0
    weight = to_w8a8(w)
    out = weight.product(weight.encode(x))
    assert bool(out.isfinite().all())
    assert not out[1].any()
    assert not out[:, 2].any()
    assert bool((out[0, [0, 1, 3, 4]] != 0).all())
