"""Moving a weight so that it makes good what its inputs lost."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.quantize.calibration import Calibration

T, K, OUT = 2000, 32, 8


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(x: Tensor, weight: Tensor, wanted: Tensor) -> float:
    return float((x @ weight.T - wanted).norm() / wanted.norm())


def test_inputs_that_lost_something_are_made_good() -> None:
    exact, weight = randn(T, K, seed=0), randn(OUT, K, seed=1)
    x = exact * 0.8 + 0.05 * randn(T, K, seed=2)
    calibration = Calibration()
    for part in range(0, T, 500):
        rows = slice(part, part + 500)
        calibration.add(x[rows], exact[rows])
    moved = calibration.moved(weight)
    assert off(x, moved, exact @ weight.T) < 0.5 * off(x, weight, exact @ weight.T)
    torch.testing.assert_close(calibration.hessian(), x.T @ x, rtol=1e-4, atol=1e-2)


def test_a_stream_that_lags_is_caught_up_with() -> None:
    x, weight = randn(T, K, seed=0), randn(OUT, K, seed=1)
    lag = 0.3 * x @ randn(OUT, K, seed=3).T
    calibration = Calibration()
    for part in range(0, T, 500):
        rows = slice(part, part + 500)
        calibration.add(x[rows], x[rows], lag[rows])
    wanted = x @ weight.T + lag
    assert off(x, calibration.moved(weight), wanted) < 0.3 * off(x, weight, wanted)


def test_nothing_lost_moves_nothing() -> None:
    x, weight = randn(T, K, seed=0), randn(OUT, K, seed=1)
    calibration = Calibration()
    calibration.add(x, x)
    torch.testing.assert_close(calibration.moved(weight), weight)


def test_without_inputs_the_weight_stays() -> None:
    calibration, weight = Calibration(), randn(OUT, K, seed=1)
    calibration.add(torch.zeros(3, K), torch.ones(3, K))
    assert torch.equal(calibration.moved(weight), weight)
