"""Fits find the coefficients that made the losses, and know how well they know them."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from fourfold.errors import ConfigError
from fourfold.train.law.fitting import Fit, fit, hold_out, interval
from fourfold.train.law.forms import Points, coefficients, form_for, points_of
from fourfold.train.law.leverage import dense_equivalent
from fourfold.train.law.solve import Bounds, huber, minimise, predict
from tests.cpu.train.law.known import CENTRE, RATIOS, SPARSE, Known, grid

LAW = Known()
FLAT = Known(g=0.0)
"""The per-ratio form has one leverage for all sizes."""


def test_a_law_without_noise_is_found_exactly() -> None:
    fitted = fit(grid(LAW), "joint", starts=64, resamplings=0, seed=0)
    assert np.abs(fitted.residual_N).max() < 1e-6
    found = coefficients(fitted.form, fitted.theta_P)
    shift = (fitted.form.centre - math.log(CENTRE)) * LAW.g
    wanted = {"E": LAW.e, "a": LAW.a, "d": LAW.d + shift, "g": LAW.g, "b": LAW.b}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    assert found["w"] == pytest.approx(0.0, abs=1e-4)
    assert found["A"] == pytest.approx(LAW.a_term * CENTRE**LAW.a, rel=1e-2)
    assert found["B"] == pytest.approx(LAW.b_term * 1e8**LAW.b, rel=1e-2)


def test_each_ratio_s_own_coefficient_is_found() -> None:
    fitted = fit(grid(FLAT), "per-ratio", starts=64, resamplings=0, seed=0)
    found = coefficients(fitted.form, fitted.theta_P)
    for ratio in RATIOS:
        leverage = (found["A1"] / found[f"A{ratio}"]) ** (1 / found["a"])
        assert leverage == pytest.approx(FLAT.leverage(4e6, ratio), rel=1e-3)


def test_one_number_of_tokens_tells_nothing_of_tokens() -> None:
    records = [record for record in grid(FLAT) if record.tokens == 200_000_000]
    fitted = fit(records, "per-ratio", starts=64, resamplings=0, seed=0)
    assert "b" not in fitted.form.parameters
    [leverage] = dense_equivalent(
        fitted.form, fitted.theta_P[None], active=4e6, ratio=8.0, tokens=2e8
    )
    assert leverage == pytest.approx(FLAT.leverage(4e6, 8), rel=1e-3)


def test_a_wild_run_hardly_moves_a_fit() -> None:
    """Huber's loss: a run that went wrong weighs as little as its deviation is large."""
    records = grid(LAW, noise=3e-4)
    wild = msgspec.structs.replace(records[-1], loss=records[-1].loss * 1.2)
    places = Points(np.array([4e6, 8e6]), np.array([8.0, 16.0]), np.array([2e8, 1e8]))
    one, other = (
        fit(used, "joint", starts=64, resamplings=0, seed=0).loss(places)
        for used in (records, [*records[:-1], wild])
    )
    assert other == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize(("law", "form"), [(FLAT, "per-ratio"), (LAW, "joint")])
def test_intervals_hold_the_truth_as_often_as_they_say(law: Known, form: str) -> None:
    """Leverages of 16 noisy grids: their 80 % intervals hold most of the truths, and not all."""
    held = []
    for seed in range(16):
        fitted = fit(grid(law, noise=1e-3, seed=seed), form, starts=8, resamplings=40, seed=seed)
        for ratio in (4, 32):
            place = {"active": 4e6, "ratio": float(ratio), "tokens": 2e8}
            sampled = dense_equivalent(fitted.form, fitted.sampled_QP, **place)
            low, high = interval(sampled, 0.8)
            held.append(low <= law.leverage(4e6, ratio) <= high)
    assert 0.6 <= np.mean(held) < 1.0


def test_fits_foretell_runs_that_they_have_not_seen() -> None:
    noise = 5e-4
    records = grid(LAW, noise=noise, seed=3)
    held = {each.what: each for each in hold_out(records, "joint", starts=32, seed=0)}
    assert list(held) == [
        "the largest dense model",
        "the largest sparse models",
        *(f"ratio {ratio}" for ratio in RATIOS),
    ]
    assert held["the largest dense model"].names == tuple(
        f"64M-x1-{tokens}M-s0" for tokens in (50, 100, 200)
    )
    assert len(held["the largest sparse models"].names) == 3 * len(RATIOS)
    assert len(held["ratio 16"].names) == 3 * len(SPARSE)
    for each in held.values():
        assert each.error < 10 * noise * LAW.e


def test_held_out_runs_are_not_seen() -> None:
    """Losses that are held out may be anything: what is foretold of them stays the same."""
    records = grid(LAW, noise=5e-4)
    changed = [
        msgspec.structs.replace(r, loss=2 * r.loss) if r.model == "64M" else r for r in records
    ]
    one, other = (hold_out(used, "joint", starts=16, seed=0)[0] for used in (records, changed))
    assert one.what == other.what == "the largest dense model"
    assert (one.predicted_N == other.predicted_N).all()
    assert (2 * one.measured_N == other.measured_N).all()


def test_a_law_that_is_not_the_form_s_is_noticed() -> None:
    """Where sparse models want more tokens, the joint form follows and the per-ratio one cannot."""
    records = grid(Known(w=0.1))
    errors = {}
    for form in ("per-ratio", "joint"):
        fitted = fit(records, form, starts=32, resamplings=0, seed=0)
        errors[form] = float(np.abs(fitted.residual_N).max())
    assert errors["joint"] < 1e-5
    assert errors["per-ratio"] > 1e-3


@pytest.mark.parametrize(
    ("keep", "complaint"),
    [
        (lambda r: r.ratio == 1, "dense ones and sparse ones"),
        (lambda r: r.ratio > 1, "dense ones and sparse ones"),
        (lambda r: r.active <= 2_000_000, "at least three sizes"),
        (lambda r: r.tokens < 60_000_000 and r.ratio in (1, 32) and r.active > 1e7, "sizes"),
    ],
)
def test_too_few_runs_are_refused(keep: object, complaint: str) -> None:
    records = [record for record in grid(LAW) if keep(record)]  # type: ignore[operator]
    with pytest.raises(ConfigError, match=complaint):
        fit(records, "joint", starts=8, resamplings=0, seed=0)


def test_a_ratio_that_was_not_run_needs_the_joint_form() -> None:
    points, _ = points_of(grid(LAW))
    form = form_for("per-ratio", points)
    with pytest.raises(ConfigError, match="no run had the ratio 64; use the joint form"):
        form.terms(Points(np.array([1e6]), np.array([64.0]), np.array([1e8])))


def test_the_solver_agrees_with_a_plain_search() -> None:
    """One term and one parameter: the minimum of Huber's loss is found on a fine grid too."""
    draws = np.random.default_rng(0)
    target_N = draws.normal(size=9)
    terms = np.ones((1, 9, 1))
    bounds = Bounds(np.array([-5.0]), np.array([5.0]))
    theta, loss = minimise(
        terms, target_N[None], np.ones((1, 9)), np.array([[3.0], [-4.0]]), bounds, delta=0.1
    )
    places = np.linspace(-5, 5, 100001)
    losses = huber(places[:, None] - target_N, 0.1).sum(1)
    assert loss == pytest.approx([losses.min()] * 2, rel=1e-6)
    assert theta[:, 0] == pytest.approx([places[losses.argmin()]] * 2, abs=1e-3)


def test_a_prediction_is_the_logarithm_of_the_sum_of_terms() -> None:
    points, _ = points_of(grid(LAW))
    form = form_for("joint", points)
    theta = dict.fromkeys(form.parameters, 0.0) | {"ln E": 0.5, "a": 0.2, "ln A": -0.3, "b": 0.3}
    theta |= {"ln B": -1.0, "d": 0.1, "g": 0.02, "w": 0.05}
    theta_P = np.array([theta[name] for name in form.parameters])
    c = coefficients(form, theta_P)
    n, r, d = points.active_N, points.ratio_N, points.tokens_N
    helped = r ** (c["d"] + c["g"] * (np.log(n) - form.centre))
    loss = c["E"] + c["A"] / (n ** c["a"] * helped) + c["B"] * r ** c["w"] / d ** c["b"]
    assert np.exp(predict(form.terms(points), theta_P[None])[0]) == pytest.approx(loss)
    fitted = Fit(form, theta_P, theta_P[None].repeat(3, 0), np.zeros(len(points)))
    assert fitted.loss(points) == pytest.approx(loss)
    assert fitted.sampled_loss(points) == pytest.approx(np.stack([loss] * 3))
