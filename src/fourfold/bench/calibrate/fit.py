"""Fits a roofline to measured times, and says how far it is off on others.

Which of the three bounds holds for a point follows from the coefficients that are sought, so both
are found in turns, from several starts. Errors are relative: a microsecond of ten counts as much as
a millisecond of ten.

Shapes: N points, 7 coefficients.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fourfold.quadrants.costs import ModelError, Roofline, Work

Floats = NDArray[np.float64]
_NAMES = (
    "fixed",
    "per_byte",
    "per_operation",
    "per_exponential",
    "per_tile",
    "per_step",
    "per_byte_between",
)
_ALWAYS = [0, 6]
_BOUNDS = ([1], [2, 3, 4], [5])
"""Coefficients of the bounds: bytes, computing, steps."""
_BYTES, _COMPUTING, _STEPS = range(3)
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST_TURNS = 20


def held_out(points: int) -> list[bool]:
    """Which points a model is not fitted to: every third, but neither the first nor the last."""
    return [i % 3 == 1 and i < points - 1 for i in range(points)]


def error_of(predicted: Sequence[float], measured: Sequence[float]) -> ModelError:
    """The relative errors of predictions; at least one."""
    off = [abs(p / m - 1.0) for p, m in zip(predicted, measured, strict=True)]
    return ModelError(median=statistics.median(off), worst=max(off), points=len(off))


def fit_roofline(works: Sequence[Work], seconds: Sequence[float]) -> Roofline:
    """The roofline with the least squared relative error, no coefficient negative."""
    features_N7 = np.array(
        [(1.0, w.bytes, w.padded, w.exponentials, w.tiles, w.longest, w.between) for w in works]
    )
    relative_N7 = features_N7 / np.array(seconds)[:, None]
    best: tuple[float, Floats] | None = None
    for bound_N in _starts(features_N7):
        for _ in range(_MOST_TURNS):
            active_N7 = relative_N7.copy()
            for bound, columns in enumerate(_BOUNDS):
                active_N7[np.ix_(bound_N != bound, columns)] = 0.0
            solution_7 = _non_negative(active_N7)
            priced_N3 = np.stack([relative_N7[:, c] @ solution_7[c] for c in _BOUNDS], 1)
            predicted_N = relative_N7[:, _ALWAYS] @ solution_7[_ALWAYS] + priced_N3.max(1)
            error = float(np.square(predicted_N - 1.0).mean())
            if best is None or error < best[0]:
                best = error, solution_7
            now_N = priced_N3.argmax(1)
            if (now_N == bound_N).all():
                break
            bound_N = now_N
    assert best is not None
    return Roofline(**dict(zip(_NAMES, map(float, best[1]), strict=True)))


def _starts(features_N7: Floats) -> list[NDArray[np.int64]]:
    """Bounds to begin with: some share of the points, those with the most bytes for their
    operations, bound by bytes, and of the rest some share by their longest steps."""
    bytes_per_operation = features_N7[:, 1] / features_N7[:, 2]
    steps_per_operation = features_N7[:, 5] / features_N7[:, 2]
    starts = []
    for by_bytes, by_steps in itertools.product(_SHARES, _SHARES):
        bound_N = np.full(len(features_N7), _COMPUTING)
        bound_N[_most(steps_per_operation, by_steps)] = _STEPS
        bound_N[_most(bytes_per_operation, by_bytes)] = _BYTES
        starts.append(bound_N)
    return starts


def _most(values: Floats, share: float) -> NDArray[np.int64]:
    """Places of the largest values, so large a share of all."""
    return np.argsort(-values)[: round(share * len(values))]


def _non_negative(matrix_N7: Floats) -> Floats:
    """The x >= 0 that makes `matrix @ x` nearest to ones. Exact: of the least squares solutions on
    every subset of the columns, the best that has no negative part."""
    norm_7 = np.sqrt(np.square(matrix_N7).sum(0))
    columns = np.flatnonzero(norm_7).tolist()
    best, least = np.zeros(len(norm_7)), float(len(matrix_N7))
    for size in range(len(columns), 0, -1):
        for subset in itertools.combinations(columns, size):
            chosen = list(subset)
            part = matrix_N7[:, chosen] / norm_7[chosen]
            solution = np.linalg.lstsq(part, np.ones(len(part)))[0]
            left = float(np.square(part @ solution - 1.0).sum())
            if (solution >= 0).all() and left < least:
                least = left
                best = np.zeros(len(norm_7))
                best[chosen] = solution / norm_7[chosen]
        if size == len(columns) and best.any():  # nothing can be better than all columns
            break
    return best
