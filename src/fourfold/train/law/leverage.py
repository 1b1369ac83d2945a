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

from fourfold.train.law.checks import by_tokens, dense_curve, tells_size
from fourfold.train.law.fitting import Fit, interval
from fourfold.train.law.forms import Form, Points
from fourfold.train.law.records import RunRecord

Floats = NDArray[np.float64]
CLAIMED = 7.0
"""The leverage that is looked for."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A figure with the middle 95 % of its resamplings. Absent: without bound, no dense model of
    any size being as good."""

    value: float | UnsetType = UNSET
    low: float | UnsetType = UNSET
    high: float | UnsetType = UNSET


class Leverage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of the sparse models of one size and ratio on as many tokens."""

    model: str
    """The size, by the grid's name; its active parameters grow a little with the router."""
    active: int
    ratio: int
    tokens: int
    forms: dict[str, Estimate]
    """By the name of the form, the one that fits best first. Without those that do not tell size:
    their exponent of it is on its bound, or they do not describe the runs."""
    direct: float | UnsetType = UNSET
    """Between dense runs on as many tokens, without those that lose no less than a smaller one;
    absent where no two enclose the loss."""
    above: float | UnsetType = UNSET
    """Where the loss is less than that of all these dense runs: the leverage is more than this."""
    compute: float | UnsetType = UNSET
    """Training FLOPs of the dense model over those of the sparse one, by the best form."""
    interpolated: bool
    """Whether the dense model, by the best form, is no larger than the largest that was run on as
    many tokens."""


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whether models of one size reach `CLAIMED` on so many tokens, and at which ratio: by the
    forms, and between dense runs."""

    model: str
    tokens: int
    verdict: str
    """By the forms: "not told" (no form tells sizes), "reached" (at a tried ratio), "perhaps" (the
    same, but its interval reaches below), "extrapolated" (at a tried ratio, but its dense model is
    larger than any that was run), "foretold" (only at a larger ratio than was tried), "not
    reached"."""
    ratio: float | UnsetType = UNSET
    leverage: Estimate = Estimate()
    direct: Leverage | UnsetType = UNSET
    """That of the least tried ratio that reaches it between dense runs, or of the best one; absent
    where dense runs say nothing of any."""


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


def direct_leverage(
    dense: Sequence[RunRecord], sparse: Sequence[RunRecord]
) -> tuple[float | None, float | None]:
    """The leverage of runs alike but for their seeds, between the dense ones of runs on as many
    tokens; and what it is more than, where the sparse ones are better than all of these. None for
    what they do not say.

    Dense runs that lose no less than a smaller one are left out: they are no fair peers, and would
    make the leverage larger."""
    loss = float(np.mean([record.loss for record in sparse]))
    active = sparse[0].active
    frontier: list[tuple[int, float]] = []
    for size, reached in zip(*dense_curve(dense), strict=True):
        if not frontier or reached < frontier[-1][1]:
            frontier.append((size, reached))
    sizes, losses = [size for size, _ in frontier], [reached for _, reached in frontier]
    if losses and loss < losses[-1]:
        return None, sizes[-1] / active
    for i in range(len(sizes) - 1):
        if losses[i] >= loss >= losses[i + 1]:
            way = math.log(losses[i] / loss) / math.log(losses[i] / losses[i + 1])
            return float(sizes[i] ** (1 - way) * sizes[i + 1] ** way) / active, None
    return None, None


def leverages(records: Sequence[RunRecord], fits: Sequence[Fit]) -> list[Leverage]:
    """Of every size and ratio that was run, on every number of tokens, fewest first. The first fit
    that tells sizes says what that is in compute, and whether it is interpolated."""
    told = [fit for fit in fits if tells_size(fit, records)]
    found = []
    for group in by_tokens(records):
        cells: dict[tuple[str, int], list[RunRecord]] = {}
        for record in sorted(group, key=lambda record: record.active):
            if record.ratio > 1:
                cells.setdefault((record.model, record.ratio), []).append(record)
        found += [_leverage(records, group, cell, told) for cell in cells.values()]
    return found


def _leverage(
    records: Sequence[RunRecord],
    group: Sequence[RunRecord],
    cell: Sequence[RunRecord],
    told: Sequence[Fit],
) -> Leverage:
    """Of the runs of a cell, among those on as many tokens."""
    first = cell[0]
    place = {"active": float(first.active), "ratio": float(first.ratio)}
    tokens = group[-1].tokens
    place["tokens"] = float(tokens)
    estimates = {fit.form.name: _estimate(fit, place) for fit in told}
    direct, above = direct_leverage(group, cell)
    compute: float | UnsetType = UNSET
    interpolated = False
    best = estimates[told[0].form.name].value if told else UNSET
    if not isinstance(best, UnsetType):
        compute = _compute(records, first, best)
        sizes, _ = dense_curve(group)
        interpolated = bool(sizes) and first.active * best <= max(sizes)
    return Leverage(
        model=first.model,
        active=first.active,
        ratio=first.ratio,
        tokens=tokens,
        forms=estimates,
        direct=UNSET if direct is None else direct,
        above=UNSET if above is None else above,
        compute=compute,
        interpolated=interpolated,
    )


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


def on_most_tokens(found: Sequence[Leverage]) -> list[Leverage]:
    """Those of each size and ratio on the most tokens that it was run on."""
    most = {(row.model, row.ratio): row.tokens for row in found}
    return [row for row in found if row.tokens == most[row.model, row.ratio]]


def claims(found: Sequence[Leverage], joint: Fit, *, most_ratio: float = 256.0) -> list[Claim]:
    """Whether the sparse models of each size reach `CLAIMED` on each number of tokens: at a ratio
    that was tried, by the form that fits best, or at a larger one, by the joint form."""
    cells: dict[tuple[str, int], list[Leverage]] = {}
    for leverage in found:
        cells.setdefault((leverage.model, leverage.tokens), []).append(leverage)
    return [
        msgspec.structs.replace(_claim(own, joint, most_ratio), direct=_direct_claim(own))
        for own in cells.values()
    ]


def _claim(own: Sequence[Leverage], joint: Fit, most_ratio: float) -> Claim:
    """By the forms; `own` by growing ratio."""
    claim = Claim(model=own[0].model, tokens=own[0].tokens, verdict="not told")
    if not own[0].forms:
        return claim
    reached = [row for row in own if _reaches(next(iter(row.forms.values())).value)]
    if reached:
        # One whose whole interval is above it says more than the first.
        row = next(filter(_is_sure, reached), reached[0])
        verdict = "reached" if _is_sure(row) else "perhaps"
        return msgspec.structs.replace(
            claim,
            verdict=verdict if row.interpolated else "extrapolated",
            ratio=float(row.ratio),
            leverage=next(iter(row.forms.values())),
        )
    claim = msgspec.structs.replace(claim, verdict="not reached")
    if joint.form.name not in own[0].forms:
        return claim
    largest, active = own[-1].ratio, own[-1].active
    for ratio in np.geomspace(largest, most_ratio, 64)[1:] if largest < most_ratio else ():
        place = {"active": float(active), "ratio": float(ratio), "tokens": float(own[0].tokens)}
        estimate = _estimate(joint, place)
        if _reaches(estimate.value):
            return msgspec.structs.replace(
                claim, verdict="foretold", ratio=float(ratio), leverage=estimate
            )
    return claim


def _reaches(value: float | UnsetType) -> bool:
    """Of what an estimate says; absent is without bound."""
    return isinstance(value, UnsetType) or value >= CLAIMED


def _is_sure(row: Leverage) -> bool:
    """Whether a claim is interpolated and its whole interval reaches it."""
    return row.interpolated and _reaches(next(iter(row.forms.values())).low)


def _direct_claim(own: Sequence[Leverage]) -> Leverage | UnsetType:
    known = [row for row in own if _least(row)]
    for row in known:
        if _least(row) >= CLAIMED:
            return row
    # What is only known to be more may be the most.
    return max(known, key=lambda row: (row.above is not UNSET, _least(row)), default=UNSET)


def _least(row: Leverage) -> float:
    """What a leverage is at least, between dense runs; 0 where these say nothing."""
    figures = (row.direct, row.above)
    return max((0.0 if isinstance(each, UnsetType) else each) for each in figures)
