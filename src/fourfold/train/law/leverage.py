"""How many times more active parameters a dense model needs for a sparse model's loss.

At equal tokens, as the ratio is usually quoted, and what that is in training compute. Three ways:
by each form of the law, and directly between two dense runs whose losses enclose the sparse one.

Shapes: N points, Q resamplings, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from fourfold.train.law.fitting import Fit, interval
from fourfold.train.law.forms import Form, Points
from fourfold.train.law.records import RunRecord

Floats = NDArray[np.float64]
_SAME_TOKENS = 0.02
CLAIMED = 7.0
"""The leverage that is looked for."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A figure with the middle 95 % of its resamplings. Absent: without bound, no dense model of
    any size being as good."""

    value: float | UnsetType = UNSET
    low: float | UnsetType = UNSET
    high: float | UnsetType = UNSET


class Leverage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of the sparse models of one size and ratio."""

    model: str
    """The size, by the grid's name; its active parameters grow a little with the router."""
    active: int
    ratio: int
    tokens: int
    forms: dict[str, Estimate]
    """By the name of the form, the one that fits best first. Without those whose exponent of size
    these runs do not tell."""
    direct: float | UnsetType = UNSET
    """Between dense runs on as many tokens; absent where no two enclose the loss."""
    compute: float | UnsetType = UNSET
    """Training FLOPs of the dense model over those of the sparse one, by the best form."""
    interpolated: bool
    """Whether the dense model, by the best form, is no larger than the largest that was run on as
    many tokens."""


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether models of one size reach `CLAIMED`, and at which ratio."""

    model: str
    verdict: str
    """"not told" (the runs do not tell the exponent of size), "reached" (at a tried ratio),
    "extrapolated" (at a tried ratio, but its dense model is larger than any that was run),
    "foretold" (only at a larger ratio than was tried), "not reached"."""
    ratio: float | UnsetType = UNSET
    leverage: Estimate = Estimate()


def dense_equivalent(
    form: Form, theta_QP: Floats, *, active: float, ratio: float, tokens: float
) -> Floats:
    """The leverage by each of Q fits [Q]; infinite where no dense model is as good."""
    places = Points(np.full(2, active), np.array([1.0, ratio]), np.full(2, tokens))
    log_JNQ = np.einsum("jnp,qp->jnq", form.terms(places), theta_QP)
    dense, sparse = np.exp(log_JNQ[1])
    if form.with_tokens:
        # What the tokens cost the sparse model more must be made up for by its size.
        sparse = sparse + np.exp(log_JNQ[2, 1]) - np.exp(log_JNQ[2, 0])
    power = theta_QP[:, form.parameters.index("a")]
    leverage = np.full(len(theta_QP), np.inf)
    beaten = sparse > 0
    with np.errstate(over="ignore"):  # so small an exponent that no size is large enough
        leverage[beaten] = (dense[beaten] / sparse[beaten]) ** (1.0 / power[beaten])
    return leverage


def direct_leverage(records: Sequence[RunRecord], sparse: Sequence[RunRecord]) -> float | None:
    """The leverage of runs alike but for their seeds, between dense runs on as many tokens; None
    where these do not enclose their loss."""
    loss = float(np.mean([record.loss for record in sparse]))
    sizes, losses = _dense_curve(records, sparse[0].tokens)
    below = [i for i in range(len(sizes) - 1) if losses[i] >= loss >= losses[i + 1]]
    if not below:
        return None
    i = below[0]
    if losses[i] == losses[i + 1]:
        return sizes[i] / sparse[0].active
    way = math.log(losses[i] / loss) / math.log(losses[i] / losses[i + 1])
    size = sizes[i] ** (1 - way) * sizes[i + 1] ** way
    return float(size / sparse[0].active)


def _dense_curve(records: Sequence[RunRecord], tokens: int) -> tuple[list[int], list[float]]:
    """Sizes of the dense runs on about so many tokens, and their losses, seeds averaged."""
    found: dict[int, list[float]] = {}
    for record in records:
        if record.ratio == 1 and abs(record.tokens / tokens - 1) <= _SAME_TOKENS:
            found.setdefault(record.active, []).append(record.loss)
    sizes = sorted(found)
    return sizes, [float(np.mean(found[size])) for size in sizes]


def leverages(records: Sequence[RunRecord], fits: Sequence[Fit]) -> list[Leverage]:
    """Of every size and ratio that was run, on the most tokens that it was run on. The first fit
    that tells the exponent of size says what that is in compute, and whether it is interpolated."""
    told = [fit for fit in fits if "a" not in fit.untold]
    cells: dict[tuple[str, int], list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.active):
        if record.ratio > 1:
            cells.setdefault((record.model, record.ratio), []).append(record)
    found = []
    for (model, ratio), cell in cells.items():
        active = cell[0].active
        tokens = max(record.tokens for record in cell)
        longest = [r for r in cell if abs(r.tokens / tokens - 1) <= _SAME_TOKENS]
        place = {"active": float(active), "ratio": float(ratio), "tokens": float(tokens)}
        estimates = {fit.form.name: _estimate(fit, place) for fit in told}
        first = estimates[told[0].form.name].value if told else UNSET
        direct = direct_leverage(records, longest)
        sizes, _ = _dense_curve(records, tokens)
        compute: float | UnsetType = UNSET
        interpolated = False
        if not isinstance(first, UnsetType):
            compute = _compute(records, longest[0], first)
            interpolated = bool(sizes) and active * first <= max(sizes)
        found.append(
            Leverage(
                model=model,
                active=active,
                ratio=ratio,
                tokens=tokens,
                forms=estimates,
                direct=UNSET if direct is None else direct,
                compute=compute,
                interpolated=interpolated,
            )
        )
    return found


def _estimate(fit: Fit, place: dict[str, float]) -> Estimate:
    value = float(dense_equivalent(fit.form, fit.theta_P[None], **place)[0])
    if not len(fit.sampled_QP):
        return Estimate(value=_bounded(value))
    low, high = interval(dense_equivalent(fit.form, fit.sampled_QP, **place))
    return Estimate(value=_bounded(value), low=_bounded(low), high=_bounded(high))


def _bounded(value: float) -> float | UnsetType:
    return value if math.isfinite(value) else UNSET


def _compute(records: Iterable[RunRecord], sparse: RunRecord, leverage: float) -> float:
    """FLOPs of the equal dense model over those of the sparse one, on as many tokens."""
    dense = {r.active: r.flops_per_token for r in records if r.ratio == 1}
    sizes = sorted(dense)
    log_sizes = np.log(sizes)
    # Beyond the sizes that were run, a token costs in proportion to the size.
    per_parameter = np.interp(
        math.log(leverage * sparse.active), log_sizes, [dense[size] / size for size in sizes]
    )
    return float(per_parameter * leverage * sparse.active / sparse.flops_per_token)


def claims(found: Sequence[Leverage], joint: Fit, *, most_ratio: float = 256.0) -> list[Claim]:
    """Whether the sparse models of each size reach `CLAIMED`: at a ratio that was tried, by the
    form that fits best, or at a larger one, by the joint form."""
    claimed = []
    for model in dict.fromkeys(leverage.model for leverage in found):
        own = [leverage for leverage in found if leverage.model == model]
        claimed.append(_claim(model, own, joint, most_ratio))
    return claimed


def _claim(model: str, own: Sequence[Leverage], joint: Fit, most_ratio: float) -> Claim:
    """`own` by growing ratio."""
    if not own[0].forms:
        return Claim(model=model, verdict="not told")
    for leverage in own:
        first = next(iter(leverage.forms.values()))
        if isinstance(first.value, UnsetType) or first.value >= CLAIMED:
            verdict = "reached" if leverage.interpolated else "extrapolated"
            ratio = float(leverage.ratio)
            return Claim(model=model, verdict=verdict, ratio=ratio, leverage=first)
    if joint.form.name not in own[0].forms:
        return Claim(model=model, verdict="not reached")
    largest, active = own[-1].ratio, own[-1].active
    tokens = float(max(leverage.tokens for leverage in own))
    for ratio in np.geomspace(largest, most_ratio, 64)[1:] if largest < most_ratio else ():
        place = {"active": float(active), "ratio": float(ratio), "tokens": tokens}
        estimate = _estimate(joint, place)
        if isinstance(estimate.value, UnsetType) or estimate.value >= CLAIMED:
            return Claim(model=model, verdict="foretold", ratio=float(ratio), leverage=estimate)
    return Claim(model=model, verdict="not reached")
