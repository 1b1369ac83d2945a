"""Forms that the law may have, each a sum of power laws.

With N active parameters, R experts for each that is chosen (1: dense), D tokens:

- `per-ratio`: L = E + A_R / N**a + B / D**b, with a coefficient A_R of its own for each ratio.
- `joint`: L = E + A / (N**a R**(d + g ln(N / N0))) + B R**w / D**b, which also says what happens at
  ratios that were not tried; N0 is the geometric mean of the sizes. With d > 0 sparsity helps, with
  g > 0 it helps large models more, and with w > 0 sparse models want more tokens.

Shapes: J terms, N points, P parameters, M starts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fourfold.errors import ConfigError
from fourfold.train.law.records import RunRecord
from fourfold.train.law.solve import Bounds

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Points:
    """Where losses are: arrays [N] of active parameters, ratios and tokens."""

    active_N: Floats
    ratio_N: Floats
    tokens_N: Floats

    def __len__(self) -> int:
        return len(self.active_N)

    def at(self, chosen: NDArray[np.intp]) -> Points:
        return Points(self.active_N[chosen], self.ratio_N[chosen], self.tokens_N[chosen])


def points_of(records: Sequence[RunRecord]) -> tuple[Points, Floats]:
    """The places of records, and their losses [N]."""
    columns = np.array([(r.active, r.ratio, r.tokens, r.loss) for r in records], np.float64)
    columns = columns.reshape(-1, 4)
    return Points(columns[:, 0], columns[:, 1], columns[:, 2]), columns[:, 3]


@dataclasses.dataclass(frozen=True)
class Form:
    """One form, with the parameters that the points it is fitted to can tell."""

    name: str
    parameters: tuple[str, ...]
    """`ln E` and so on; exponents by their letters."""
    ratios: tuple[float, ...]
    """Those that have their own coefficient; empty in the joint form."""
    centre: float
    """ln N0."""
    tokens_centre: float
    """ln of the geometric mean of D: B is fitted relative to it, for the sake of the solver."""
    with_tokens: bool
    """Whether runs differ in tokens; if not, E stands for E + B / D**b."""

    def terms(self, points: Points) -> Floats:
        """The linear terms of the log-prediction: [J, N, P]. ConfigError for a ratio that has no
        coefficient."""
        one = np.ones(len(points))
        size = np.log(points.active_N) - self.centre
        ratio = np.log(points.ratio_N)
        tokens = np.log(points.tokens_N) - self.tokens_centre
        columns = {name: np.zeros((3, len(points))) for name in self.parameters}
        columns["ln E"][0] = one
        columns["a"][1] = -size
        if self.ratios:
            known = np.isin(points.ratio_N, self.ratios)
            if not known.all():
                unknown = ", ".join(f"{r:g}" for r in np.unique(points.ratio_N[~known]))
                raise ConfigError(f"no run had the ratio {unknown}; use the joint form for it")
            for value in self.ratios:
                columns[f"ln A{value:g}"][1] = points.ratio_N == value
        else:
            columns["ln A"][1] = one
            columns["d"][1] = -ratio
            columns["g"][1] = -ratio * size
        if self.with_tokens:
            columns["ln B"][2] = one
            columns["b"][2] = -tokens
            if "w" in columns:
                columns["w"][2] = ratio
        terms = np.stack(list(columns.values()), -1)
        return terms if self.with_tokens else terms[:2]

    def bounds(self) -> Bounds:
        """Wide: a fit that comes to lie on one says that its runs do not tell the parameter."""
        limits = {"a": (0.01, 2.0), "b": (0.01, 2.0), "d": (-1.0, 2.0), "g": (-0.5, 0.5)}
        limits["w"] = (-1.0, 1.0)
        pairs = [limits.get(name, (-12.0, 6.0)) for name in self.parameters]
        least, most = np.array(pairs, np.float64).T
        return Bounds(least, most)

    def starts(self, count: int, loss_N: Floats, seed: int) -> Floats:
        """Places to begin from [M, P], spread over what such laws usually have."""
        draws = np.random.default_rng(seed)
        lowest = float(loss_N.min())
        drawn = {
            "ln E": np.log(lowest * draws.uniform(0.3, 0.98, count)),
            "a": draws.uniform(0.05, 0.8, count),
            "b": draws.uniform(0.05, 0.8, count),
            "d": draws.uniform(0.0, 0.5, count),
            "g": draws.uniform(-0.05, 0.05, count),
            "w": draws.uniform(-0.1, 0.1, count),
        }
        rest = {
            name: np.log(lowest * draws.uniform(0.02, 0.7, count))
            for name in self.parameters
            if name not in drawn
        }
        return np.stack([(drawn | rest)[name] for name in self.parameters], -1)


def form_for(name: str, points: Points) -> Form:
    """A form with the parameters that these points can tell. ConfigError where they are too few, or
    lack dense or sparse runs of several sizes."""
    ratios = np.unique(points.ratio_N)
    if len(np.unique(points.active_N)) < 3 or 1.0 not in ratios or len(ratios) < 2:
        raise ConfigError(
            "a law needs runs of at least three sizes, dense ones and sparse ones; extend the grid"
        )
    with_tokens = len(np.unique(np.round(np.log(points.tokens_N), 2))) > 1
    tokens = ("ln B", "b") if with_tokens else ()
    if name == "per-ratio":
        parameters = ("ln E", "a", *(f"ln A{ratio:g}" for ratio in ratios), *tokens)
    elif name == "joint":
        further = ("w",) if with_tokens and len(ratios) > 2 else ()
        parameters = ("ln E", "a", "ln A", "d", "g", *tokens, *further)
    else:
        raise ConfigError(f"there is no form {name!r}; the forms are per-ratio and joint")
    if len(points) <= len(parameters):
        raise ConfigError(
            f"the {name} form has {len(parameters)} coefficients for {len(points)} runs; extend "
            "the grid"
        )
    return Form(
        name=name,
        parameters=parameters,
        ratios=tuple(map(float, ratios)) if name == "per-ratio" else (),
        centre=float(np.log(points.active_N).mean()),
        tokens_centre=float(np.log(points.tokens_N).mean()),
        with_tokens=with_tokens,
    )


def coefficients(form: Form, theta_P: Floats) -> dict[str, float]:
    """A fit's parameters as the form is written: E, A and B instead of logarithms relative to the
    centre of the points."""
    value = dict(zip(form.parameters, map(float, theta_P), strict=True))
    written = {"E": math.exp(value["ln E"]), "a": value["a"]}
    for name in form.parameters:
        if name.startswith("ln A"):
            written[name[3:]] = math.exp(value[name] + value["a"] * form.centre)
    if form.with_tokens:
        written["B"] = math.exp(value["ln B"] + value["b"] * form.tokens_centre)
        written["b"] = value["b"]
    written |= {name: value[name] for name in ("d", "g", "w") if name in value}
    return written
