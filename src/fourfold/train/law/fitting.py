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
from fourfold.train.law.solve import minimise, predict, slopes

Floats = NDArray[np.float64]
DELTA = 1e-3
"""Where Huber's loss turns straight: a per mille of the loss."""
_LEAST_LEFT = 0.1
"""Of a chain's residuals, where it alone tells a parameter."""
_NEAR_BOUND = 1e-6
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

    @property
    def untold(self) -> tuple[str, ...]:
        """Parameters that came to lie on a bound: these runs do not tell them."""
        bounds = self.form.bounds()
        near = _NEAR_BOUND * (bounds.most_P - bounds.least_P)
        on_P = (self.theta_P < bounds.least_P + near) | (self.theta_P > bounds.most_P - near)
        return tuple(name for name, on in zip(self.form.parameters, on_P, strict=True) if on)

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

    Runs are resampled by chain: what the fit left of a chain's runs is added to its predictions
    again with one random sign (wild bootstrap), so that every resampling has the whole grid and the
    luck that a chain's runs share. ConfigError for too few runs.
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
        freed_N = _freed(residual_N, slopes(terms, theta_P), chains)
        noise_QN = _signed(freed_N, chains, resamplings, draws)
        sampled_QP = _resampled(chosen, terms, predicted_N + noise_QN, theta_P, draws)
    return Fit(chosen, theta_P, sampled_QP, residual_N)


def _best(form: Form, terms: Floats, target_N: Floats, starts: Floats) -> Floats:
    weight_N = np.ones((1, len(target_N)))
    theta_MP, loss_M = minimise(terms, target_N[None], weight_N, starts, form.bounds(), delta=DELTA)
    best: Floats = theta_MP[int(np.argmin(loss_M))]
    return best


def _freed(residual_N: Floats, slope_NP: Floats, chains: Sequence[str]) -> Floats:
    """Residuals as large as they would be of a fit that had not seen the chain they are of (CR3):
    a fit goes near what it is fitted to, and nearest to chains that it hangs on."""
    hat_NN = slope_NP @ np.linalg.pinv(slope_NP)
    freed_N = residual_N.copy()
    for chain in set(chains):
        own = np.flatnonzero(np.array(chains) == chain)
        left, vectors = np.linalg.eigh(np.eye(len(own)) - hat_NN[np.ix_(own, own)])
        grown = 1.0 / np.maximum(left, _LEAST_LEFT)
        freed_N[own] = vectors @ (grown * (vectors.T @ residual_N[own]))
    return freed_N


def _signed(
    residual_N: Floats, chains: Sequence[str], count: int, draws: np.random.Generator
) -> Floats:
    """Noise [Q, N] like the residuals: each chain's by a random sign."""
    names, chain_N = np.unique(np.array(chains), return_inverse=True)
    sign_QC = draws.choice([-1.0, 1.0], size=(count, len(names)))
    noise_QN: Floats = sign_QC[:, chain_N] * residual_N
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
    dense = max((r for r in records if r.ratio == 1), key=lambda record: record.active).model
    sparse = max((r for r in records if r.ratio > 1), key=lambda record: record.active).model
    cuts = {
        "the largest dense model": [r.ratio == 1 and r.model == dense for r in records],
        "the largest sparse models": [r.ratio > 1 and r.model == sparse for r in records],
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
    # The nearest value: between infinite ones there is nothing to interpolate.
    low, high = np.quantile(values_Q, [rest, 1.0 - rest], method="nearest")
    return float(low), float(high)
