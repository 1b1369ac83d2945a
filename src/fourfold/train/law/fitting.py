"""The coefficients of a form, how sure they are, and how well it foretells runs it has not seen.

Shapes: N points, P parameters, Q resamplings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fourfold.errors import ConfigError
from fourfold.train.law.forms import Form, Points, form_for, points_of
from fourfold.train.law.records import RunRecord
from fourfold.train.law.solve import minimise, predict

Floats = NDArray[np.float64]
DELTA = 1e-3
"""Where Huber's loss turns straight: a per mille of the loss."""
_RESTARTS = 4
"""Of a resampling: at the fit, and near it."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A form fitted to runs."""

    form: Form
    theta_P: Floats
    sampled_QP: Floats
    """The same for resampled runs; without rows where none were asked for."""
    residual_N: Floats
    """Log-loss minus log-prediction of each run."""

    def loss(self, points: Points) -> Floats:
        """Predicted losses [N]."""
        predicted_N: Floats = np.exp(predict(self.form.terms(points), self.theta_P[None])[0])
        return predicted_N

    def sampled_loss(self, points: Points) -> Floats:
        """The predictions of every resampling: [Q, N]."""
        return np.exp(predict(self.form.terms(points), self.sampled_QP))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Runs that a fit has not seen, and what it says of them."""

    what: str
    names: tuple[str, ...]
    measured_N: Floats
    predicted_N: Floats

    @property
    def error(self) -> float:
        """Root mean square in nats."""
        return float(np.sqrt(np.square(self.predicted_N - self.measured_N).mean()))


def fit(
    records: Sequence[RunRecord], form: str, *, starts: int, resamplings: int, seed: int
) -> Fit:
    """The best of many starts, and its spread over resampled runs.

    Runs are resampled by chain: a chain's residuals keep their sizes, and are given one random sign
    and another chain's place (wild bootstrap), so that every resampling has the whole grid.
    ConfigError for too few runs.
    """
    points, loss_N = points_of(records)
    chosen = form_for(form, points)
    terms, target_N = chosen.terms(points), np.log(loss_N)
    theta_P = _best(chosen, terms, target_N, chosen.starts(starts, loss_N, seed))
    predicted_N = predict(terms, theta_P[None])[0]
    residual_N = target_N - predicted_N
    sampled_QP = np.zeros((0, len(theta_P)))
    if resamplings:
        draws = np.random.default_rng(seed + 1)
        chains = [record.chain for record in records]
        told = len(set(chosen.parameters) - {"ln B", "b", "w"})
        noise_QN = _noise(residual_N, chains, told, resamplings, draws)
        sampled_QP = _resampled(chosen, terms, predicted_N + noise_QN, theta_P, draws)
    return Fit(chosen, theta_P, sampled_QP, residual_N)


def _best(form: Form, terms: Floats, target_N: Floats, starts: Floats) -> Floats:
    weight_N = np.ones((1, len(target_N)))
    theta_MP, loss_M = minimise(terms, target_N[None], weight_N, starts, form.bounds(), delta=DELTA)
    best: Floats = theta_MP[int(np.argmin(loss_M))]
    return best


def _noise(
    residual_N: Floats,
    chains: Sequence[str],
    parameters: int,
    count: int,
    draws: np.random.Generator,
) -> Floats:
    """Noise [Q, N] like the residuals: each chain's by a random sign, and larger by what a fit of
    so many parameters, which chains as wholes tell, takes away from residuals."""
    names, chain_N = np.unique(np.array(chains), return_inverse=True)
    sign_QC = draws.choice([-1.0, 1.0], size=(count, len(names)))
    grown = np.sqrt(len(names) / max(1, len(names) - parameters))
    noise_QN: Floats = sign_QC[:, chain_N] * residual_N * grown
    return noise_QN


def _resampled(
    form: Form, terms: Floats, target_QN: Floats, theta_P: Floats, draws: np.random.Generator
) -> Floats:
    """The fit of every resampling: [Q, P]."""
    count = len(target_QN)
    spread = 0.1 * np.maximum(np.abs(theta_P), 0.1)
    near = draws.normal(size=(count, _RESTARTS, len(theta_P))) * spread
    near[:, 0] = 0.0
    start_MP = (theta_P + near).reshape(-1, len(theta_P))
    target_MN = np.repeat(target_QN, _RESTARTS, axis=0)
    theta_MP, loss_M = minimise(
        terms, target_MN, np.ones((1, target_MN.shape[1])), start_MP, form.bounds(), delta=DELTA
    )
    best_Q = loss_M.reshape(count, _RESTARTS).argmin(1)
    chosen: Floats = theta_MP.reshape(count, _RESTARTS, -1)[np.arange(count), best_Q]
    return chosen


def hold_out(records: Sequence[RunRecord], form: str, *, starts: int, seed: int) -> list[HeldOut]:
    """Fits without the largest dense model, without the largest sparse one, and in the joint form
    without each sparse ratio, each asked for what it has not seen. What leaves too few runs for a
    fit is left out."""
    dense = [record.active for record in records if record.ratio == 1]
    sparse = [record.active for record in records if record.ratio > 1]
    cuts = {
        "the largest dense model": [r.ratio == 1 and r.active == max(dense) for r in records],
        "the largest sparse models": [r.ratio > 1 and r.active == max(sparse) for r in records],
    }
    if form == "joint":
        for ratio in sorted({record.ratio for record in records if record.ratio > 1}):
            cuts[f"ratio {ratio}"] = [record.ratio == ratio for record in records]
    found = []
    for what, out in cuts.items():
        unseen = [record for record, left in zip(records, out, strict=True) if left]
        seen = [record for record, left in zip(records, out, strict=True) if not left]
        try:
            fitted = fit(seen, form, starts=starts, resamplings=0, seed=seed)
            points, loss_N = points_of(unseen)
            predicted_N = fitted.loss(points)
        except ConfigError:
            continue
        names = tuple(record.name for record in unseen)
        found.append(HeldOut(what, names, loss_N, predicted_N))
    return found


def interval(values_Q: Floats, share: float = 0.95) -> tuple[float, float]:
    """The middle `share` of values."""
    rest = (1.0 - share) / 2
    low, high = np.quantile(values_Q, [rest, 1.0 - rest])
    return float(low), float(high)
