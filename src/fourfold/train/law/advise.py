"""The sparsity for a budget: which model, of those that may be trained and served, loses least.

For each ratio, training FLOPs buy a small model many tokens or a large one few; memory bounds all
its parameters, and the time of a decoding step those that a batch touches. The best of what is left
is found on a fine grid of sizes.

A size's shape is that of the models that were run: as wide for its depth, experts as large a part.

Shapes: N sizes, Q resamplings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fourfold.errors import ConfigError
from fourfold.quadrants.costs import (
    ExpertsShape,
    QuadrantCosts,
    calibration_path,
    ffn_work,
    find_costs,
    projection_work,
    shipped_costs,
)
from fourfold.train.law.checks import tells_size
from fourfold.train.law.config import AdviseConfig
from fourfold.train.law.fitting import Fit, interval
from fourfold.train.law.forms import Points
from fourfold.train.law.leverage import dense_equivalent
from fourfold.train.law.records import RunRecord

Floats = NDArray[np.float64]
_SIZES = 400
_REACH = 64.0
"""How many times smaller or larger than those that were run a model may be."""
SEARCH = "search"
"""What bounds a size that lies at the end of those that are searched: no optimum was found."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What models of other sizes look like, by those that were run."""

    expert_share: float
    """Of active parameters, those in experts."""
    chosen: int
    """Experts that a token of a sparse model chooses."""
    aspect: float
    """Width over layers."""
    block: float
    """Active parameters of a layer over its squared width."""
    overhead: float
    growth: float
    """Training FLOPs of a token beyond 6 times active parameters, for the head and attention, are
    `overhead * active ** growth`."""

    def total(self, active: float, ratio: float) -> float:
        return active * (1.0 + self.expert_share * (ratio - 1.0))

    def flops_per_token(self, active: float) -> float:
        """Of training."""
        return 6.0 * active + float(self.overhead * active**self.growth)

    def layer(self, active: float) -> tuple[float, float, float]:
        """Layers, width, and what a token passes of a layer's experts, in channels."""
        width = (active * self.aspect / self.block) ** (1 / 3)
        layers = max(1.0, width / self.aspect)
        return layers, width, self.expert_share * active / (layers * 3 * width)


def shapes_of(records: Sequence[RunRecord]) -> Shapes:
    """ConfigError where no sparse model was run."""
    sparse = [record for record in records if record.ratio > 1]
    if not sparse:
        raise ConfigError("no record is of a sparse model, so there is nothing to advise")
    shares = [(r.total - r.active) / ((r.ratio - 1) * r.active) for r in sparse]
    log_active = np.log([record.active for record in records])
    beyond = [max(1.0, record.flops_per_token - 6.0 * record.active) for record in records]
    growth, height = np.polyfit(log_active, np.log(beyond), 1)
    return Shapes(
        expert_share=float(np.median(shares)),
        chosen=round(float(np.median([r.chosen for r in sparse]))),
        aspect=float(np.median([r.width / r.layers for r in sparse])),
        block=float(np.median([r.active / (r.layers * r.width**2) for r in sparse])),
        overhead=float(np.exp(height)),
        growth=float(growth),
    )


@dataclasses.dataclass(frozen=True)
class Advice:
    """The best model of one ratio within the budgets."""

    ratio: float
    active: float
    sizes: tuple[float, float]
    """The middle 95 % of the sizes that resampled laws find best. Zero or infinite where these lie
    at the end of those that are searched."""
    total: float
    tokens: float
    loss: float
    low: float
    high: float
    """The middle 95 % of what resampled laws say."""
    dense: float
    """Active parameters of a dense model that is as good on as many tokens."""
    memory: float
    """Bytes of served weights."""
    step: float
    """Seconds of a decoding step, attention's reading of keys and values left out."""
    bound: str
    """What bounds its size: a budget ("training", "memory" or "step"), or `SEARCH`."""
    beyond: dict[str, float]
    """What of it is outside the runs that the law was fitted to ("active", "ratio", "tokens"), and
    how many times. Sizes are compared to those of sparse models, or of dense ones."""


def costs_for(config: AdviseConfig) -> QuadrantCosts:
    """What serving costs on the hardware: by its calibration, or by that of the GPU with the
    nearest bandwidth, scaled. ConfigError where neither is known."""
    calibrated = calibration_path(config.hardware).exists()
    shipped = [each.hardware for each in shipped_costs()]
    if config.bandwidth is None and not calibrated and config.hardware not in shipped:
        raise ConfigError(
            f"--hardware {config.hardware}: calibrated are {', '.join(shipped)}; run `fourfold "
            "calibrate` on it, or give its --bandwidth"
        )
    return find_costs(config.hardware, config.bandwidth or 0.0)


def _step_seconds(
    costs: QuadrantCosts, shapes: Shapes, active: float, ratio: float, config: AdviseConfig
) -> float:
    """A layer's experts as `decode_ffn` is priced, its projections as two dense products."""
    layers, width, hidden = shapes.layer(active)
    # A dense model has one, as wide.
    chosen = 1 if ratio == 1 else shapes.chosen
    ffn = ffn_work(
        config.batch,
        ExpertsShape(
            width=round(width),
            hidden=max(1, round(hidden / chosen)),
            experts=round(ratio * chosen),
            chosen=chosen,
            weight_bits=config.weight_bits,
        ),
    )
    projected = (1.0 - shapes.expert_share) * active / layers / width
    projections = sum(
        costs.projection.seconds(
            projection_work(
                config.batch,
                inputs=round(width),
                outputs=max(1, round(projected / 2)),
                weight_bits=config.weight_bits,
            )
        )
        for _ in range(2)
    )
    return layers * (costs.decode_ffn.seconds(ffn) + projections)


def ratios_for(records: Sequence[RunRecord]) -> list[int]:
    """Powers of two, up to twice the largest ratio that was run."""
    most = max(record.ratio for record in records)
    return [1 << power for power in range(16) if 1 << power <= 2 * most]


def advise(
    config: AdviseConfig, fit: Fit, records: Sequence[RunRecord], ratios: Sequence[int]
) -> list[Advice]:
    """The best model of each ratio, best first; ratios that no size of fits are left out.
    ConfigError for a law that does not tell what size or tokens are worth, or does not describe the
    runs."""
    if not fit.form.with_tokens:
        raise ConfigError(
            "all runs of this fit are on as many tokens, so it does not say what tokens are worth, "
            "and FLOPs cannot be balanced between them and size; lower --least-tokens of `fourfold "
            "law fit`, or add `tokens` to the grid"
        )
    if "a" in fit.untold:
        raise ConfigError(
            "the runs do not tell the exponent of size, so there is nothing to advise by; extend "
            "the grid"
        )
    if not tells_size(fit, records):
        raise ConfigError(
            f"the {fit.form.name} form does not describe the runs, so there is nothing to advise "
            "by; `fourfold law fit` says how far it is off and what of the runs is in doubt"
        )
    shapes, costs = shapes_of(records), costs_for(config)
    found = [_best(config, fit, records, shapes, costs, float(ratio)) for ratio in ratios]
    return sorted((advice for advice in found if advice is not None), key=lambda each: each.loss)


def _best(
    config: AdviseConfig,
    fit: Fit,
    records: Sequence[RunRecord],
    shapes: Shapes,
    costs: QuadrantCosts,
    ratio: float,
) -> Advice | None:
    run = [record.active for record in records]
    sizes_N = np.geomspace(min(run) / _REACH, max(run) * _REACH, _SIZES)
    tokens_N = np.array([config.flops / shapes.flops_per_token(size) for size in sizes_N])
    loss_N = fit.loss(Points(sizes_N, np.full(_SIZES, ratio), tokens_N))
    memory_N = np.array([shapes.total(s, ratio) * config.weight_bits / 8 for s in sizes_N])
    step_N = np.array([_step_seconds(costs, shapes, size, ratio, config) for size in sizes_N])
    within = {"training": np.ones(_SIZES, bool)}
    if config.memory_gib is not None:
        within["memory"] = memory_N <= config.memory_gib * 2**30
    if config.step_ms is not None:
        within["step"] = step_N <= config.step_ms * 1e-3
    allowed = np.logical_and.reduce(list(within.values()))
    if not allowed.any():
        return None
    best = int(np.where(allowed, loss_N, np.inf).argmin())
    at_end = best in (0, _SIZES - 1)
    # Were a budget not there, would the next larger size be better?
    bounding = [name for name, fits in within.items() if best + 1 < _SIZES and not fits[best + 1]]
    place = Points(sizes_N[[best]], np.array([ratio]), tokens_N[[best]])
    low, high = interval(fit.sampled_loss(place)[:, 0])
    active, tokens = float(sizes_N[best]), float(tokens_N[best])
    times = dense_equivalent(fit.form, fit.theta_P[None], active=active, ratio=ratio, tokens=tokens)
    return Advice(
        ratio=ratio,
        active=active,
        sizes=_best_sizes(fit, Points(sizes_N, np.full(_SIZES, ratio), tokens_N), allowed),
        total=shapes.total(active, ratio),
        tokens=tokens,
        loss=float(loss_N[best]),
        low=low,
        high=high,
        dense=active * float(times[0]),
        memory=float(memory_N[best]),
        step=float(step_N[best]),
        bound=SEARCH if at_end else bounding[0] if bounding else "training",
        beyond=_beyond(records, active=active, ratio=ratio, tokens=tokens),
    )


def _best_sizes(fit: Fit, points: Points, allowed_N: NDArray[np.bool_]) -> tuple[float, float]:
    """Where resampled laws have their least loss, the ends of the search being without bound."""
    best_Q = np.where(allowed_N, fit.sampled_loss(points), np.inf).argmin(1)
    size_N = points.active_N.copy()
    size_N[[0, -1]] = 0.0, np.inf
    return interval(size_N[best_Q])


def _beyond(
    records: Sequence[RunRecord], *, active: float, ratio: float, tokens: float
) -> dict[str, float]:
    run = {
        "active": (active, [r.active for r in records if (r.ratio > 1) == (ratio > 1)]),
        "ratio": (ratio, [r.ratio for r in records]),
        "tokens": (tokens, [r.tokens for r in records]),
    }
    times = {name: max(value / max(had), min(had) / value) for name, (value, had) in run.items()}
    return {name: factor for name, factor in times.items() if factor > 1}
