"""Fits sums of power laws in log space, many starts or many resamplings at once.

A prediction is the logarithm of a sum of exponentials of linear terms, `log sum_j exp(X_j theta)`:
every term of a scaling law, A / N**a for one, is such a term in its parameters (log A, a). Fitted
by Levenberg-Marquardt on reweighted residuals, which finds the minimum of Huber's loss.

Shapes: M fits at once, J terms, N points, P parameters.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_MOST_STEPS = 400
_DAMPING = 1e-3
_MOST_DAMPING = 1e12
_SETTLED = 1e-10
"""Relative gain of loss below which a fit is done."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least and greatest value of each parameter: [P]."""

    least_P: Floats
    most_P: Floats

    def clip(self, theta_MP: Floats) -> Floats:
        return np.clip(theta_MP, self.least_P, self.most_P)


def predict(terms_JNP: Floats, theta_MP: Floats) -> Floats:
    """Log-predictions [M, N]."""
    return _predict(terms_JNP, theta_MP)[0]


def slopes(terms_JNP: Floats, theta_P: Floats) -> Floats:
    """How a log-prediction moves with each parameter: [N, P]."""
    share_JN = _predict(terms_JNP, theta_P[None])[1][:, 0]
    slope_NP: Floats = np.einsum("jn,jnp->np", share_JN, terms_JNP)
    return slope_NP


def _predict(terms_JNP: Floats, theta_MP: Floats) -> tuple[Floats, Floats]:
    """Log-predictions [M, N], and each term's share of its sum [J, M, N]."""
    log_JMN = theta_MP @ terms_JNP.swapaxes(1, 2)
    most_MN = log_JMN.max(0)
    part_JMN = np.exp(log_JMN - most_MN)
    sum_MN = part_JMN.sum(0)
    return most_MN + np.log(sum_MN), part_JMN / sum_MN


def huber(residual: Floats, delta: float) -> Floats:
    """Half the square up to `delta`, and straight on from there."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def minimise(
    terms_JNP: Floats,
    target_MN: Floats,
    weight_MN: Floats,
    start_MP: Floats,
    bounds: Bounds,
    *,
    delta: float,
) -> tuple[Floats, Floats]:
    """Each start's way to a minimum of the weighted Huber loss of log-prediction minus target.

    Returns parameters [M, P] and losses [M]. Targets and weights are each fit's own, or the same
    for all ([1, N]).
    """
    fits = len(start_MP)
    target_MN = np.broadcast_to(target_MN, (fits, target_MN.shape[1]))
    weight_MN = np.broadcast_to(weight_MN, (fits, weight_MN.shape[1]))
    theta_MP = bounds.clip(start_MP).copy()
    predicted_MN, share_JMN = _predict(terms_JNP, theta_MP)
    loss_M = (weight_MN * huber(predicted_MN - target_MN, delta)).sum(1)
    damping_M = np.full(fits, _DAMPING)
    going = np.arange(fits)
    for _ in range(_MOST_STEPS):
        theta = theta_MP[going]
        step = _step(
            terms_JNP,
            share_JMN,
            predicted_MN - target_MN[going],
            weight_MN[going],
            damping_M[going],
            delta,
        )
        tried = bounds.clip(theta + step)
        tried_MN, tried_share_JMN = _predict(terms_JNP, tried)
        tried_loss = (weight_MN[going] * huber(tried_MN - target_MN[going], delta)).sum(1)
        better = tried_loss < loss_M[going]
        gain = np.where(better, loss_M[going] - tried_loss, 0.0)
        small = better & (gain <= _SETTLED * loss_M[going])
        theta_MP[going[better]] = tried[better]
        loss_M[going[better]] = tried_loss[better]
        damping_M[going] *= np.where(better, 0.3, 4.0)
        predicted_MN = np.where(better[:, None], tried_MN, predicted_MN)
        share_JMN = np.where(better[:, None], tried_share_JMN, share_JMN)
        left = ~small & (damping_M[going] < _MOST_DAMPING)
        going = going[left]
        predicted_MN, share_JMN = predicted_MN[left], share_JMN[:, left]
        if not len(going):
            break
    return theta_MP, loss_M


def _step(
    terms_JNP: Floats,
    share_JMN: Floats,
    residual_MN: Floats,
    weight_MN: Floats,
    damping_M: Floats,
    delta: float,
) -> Floats:
    """The damped Gauss-Newton step of Huber's loss: residuals beyond `delta` count less."""
    slope_MNP = (share_JMN.transpose(2, 1, 0) @ terms_JNP.swapaxes(0, 1)).swapaxes(0, 1)
    size_MN = np.maximum(np.abs(residual_MN), 1e-300)
    weight_MN = weight_MN * np.minimum(1.0, delta / size_MN)
    weighted_MPN = (slope_MNP * weight_MN[:, :, None]).swapaxes(1, 2)
    curvature_MPP = weighted_MPN @ slope_MNP
    gradient_MP = (weighted_MPN @ residual_MN[:, :, None])[:, :, 0]
    diagonal_MP = np.einsum("mpp->mp", curvature_MPP)
    added_MP = damping_M[:, None] * diagonal_MP + 1e-12 * diagonal_MP.max(1, keepdims=True) + 1e-30
    damped_MPP = curvature_MPP + added_MP[:, :, None] * np.eye(diagonal_MP.shape[1])
    step_MP: Floats = -np.linalg.solve(damped_MPP, gradient_MP[:, :, None])[:, :, 0]
    return step_MP
