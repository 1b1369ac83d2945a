"""What `fourfold law fit` writes: everything that plots and advice need, as JSON, and as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from fourfold.errors import ConfigError
from fourfold.files import write_atomically
from fourfold.train.law.checks import Checks, check, misfit, size_power, tells_size
from fourfold.train.law.fitting import DELTA, Fit, HeldOut, fit, hold_out, interval
from fourfold.train.law.forms import Form, coefficients
from fourfold.train.law.leverage import (
    CLAIMED,
    Claim,
    Estimate,
    Leverage,
    claims,
    leverages,
    on_most_tokens,
)
from fourfold.train.law.records import RunRecord

FORMS = ("per-ratio", "joint")
_UNKNOWN = "-"


class FormFields(msgspec.Struct, frozen=True, kw_only=True):
    """A `Form`, as it is stored."""

    parameters: tuple[str, ...]
    ratios: tuple[float, ...]
    centre: float
    tokens_centre: float
    with_tokens: bool


class HeldOutReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a form foretold runs that it had not seen."""

    what: str
    runs: dict[str, tuple[float, float]]
    """Measured and predicted loss."""
    error: float
    """Root mean square in nats."""


class FormReport(msgspec.Struct, frozen=True, kw_only=True):
    """One form's fit."""

    form: FormFields
    coefficients: dict[str, Estimate]
    untold: tuple[str, ...]
    """Parameters that the runs do not tell: their fit came to lie on a bound."""
    error: float
    """Root mean square of the losses' relative residuals."""
    misfit: float | UnsetType
    """The factor in model size that its residuals stand for; absent: without bound."""
    tells_size: bool
    """Whether leverages are read from it."""
    residuals: dict[str, float]
    """Log of measured over predicted loss, by run."""
    theta: tuple[float, ...]
    sampled: tuple[tuple[float, ...], ...]
    held_out: tuple[HeldOutReport, ...]


class LawReport(msgspec.Struct, frozen=True, kw_only=True):
    """All of a fit. `delta` is that of Huber's loss; leverages are of all numbers of tokens."""

    starts: int
    resamplings: int
    seed: int
    least_tokens: float = 0.0
    """Runs on fewer were left out."""
    delta: float
    checks: Checks
    best: str
    """The form that fits best: by it dense models are called interpolated or extrapolated."""
    forms: dict[str, FormReport]
    leverages: tuple[Leverage, ...]
    claims: tuple[Claim, ...]


def make_report(
    records: Sequence[RunRecord],
    *,
    starts: int,
    resamplings: int,
    seed: int,
    least_tokens: float = 0.0,
) -> LawReport:
    """Fits all forms. The records are of runs on `least_tokens` or more. ConfigError for too few
    runs."""
    fits = [fit(records, form, starts=starts, resamplings=resamplings, seed=seed) for form in FORMS]
    # What is said of leverages is said by the form that fits best.
    best = sorted(fits, key=lambda each: float(np.square(each.residual_N).sum()))
    checks = check(records)
    found = leverages(records, best)
    reports = {}
    for fitted in fits:
        held_out = hold_out(records, fitted.form.name, starts=starts, seed=seed)
        reports[fitted.form.name] = _form_report(records, fitted, held_out)
    return LawReport(
        starts=starts,
        resamplings=resamplings,
        seed=seed,
        least_tokens=least_tokens,
        delta=DELTA,
        checks=checks,
        best=best[0].form.name,
        forms=reports,
        leverages=tuple(found),
        claims=tuple(claims(found, fits[-1])),
    )


def _form_report(
    records: Sequence[RunRecord], fitted: Fit, held_out: Sequence[HeldOut]
) -> FormReport:
    form = fitted.form
    sampled = [coefficients(form, theta) for theta in fitted.sampled_QP]
    estimates = {}
    for name, value in coefficients(form, fitted.theta_P).items():
        estimates[name] = Estimate(value=value)
        if sampled:
            low, high = interval(np.array([each[name] for each in sampled]))
            estimates[name] = Estimate(value=value, low=low, high=high)
    names = [record.name for record in records]
    factor = misfit(fitted, size_power(records))
    return FormReport(
        form=FormFields(
            parameters=form.parameters,
            ratios=form.ratios,
            centre=form.centre,
            tokens_centre=form.tokens_centre,
            with_tokens=form.with_tokens,
        ),
        coefficients=estimates,
        untold=fitted.untold,
        error=float(np.sqrt(np.square(fitted.residual_N).mean())),
        misfit=factor if math.isfinite(factor) else UNSET,
        tells_size=tells_size(fitted, records),
        residuals=dict(zip(names, map(float, fitted.residual_N), strict=True)),
        theta=tuple(map(float, fitted.theta_P)),
        sampled=tuple(tuple(map(float, theta)) for theta in fitted.sampled_QP),
        held_out=tuple(map(_held_out_report, held_out)),
    )


def _held_out_report(held: HeldOut) -> HeldOutReport:
    pairs = zip(map(float, held.measured_N), map(float, held.predicted_N), strict=True)
    return HeldOutReport(
        what=held.what, runs=dict(zip(held.names, pairs, strict=True)), error=held.error
    )


def fit_of(report: LawReport, name: str) -> Fit:
    """A form's fit, as it was reported."""
    stored = report.forms[name]
    fields = stored.form
    form = Form(
        name=name,
        parameters=fields.parameters,
        ratios=fields.ratios,
        centre=fields.centre,
        tokens_centre=fields.tokens_centre,
        with_tokens=fields.with_tokens,
    )
    return Fit(
        form,
        np.array(stored.theta),
        np.array(stored.sampled).reshape(-1, len(stored.theta)),
        np.array(list(stored.residuals.values())),
    )


def write_report(report: LawReport, path: Path) -> None:
    """Writes what `read_report` reads."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def read_report(path: Path) -> LawReport:
    """ConfigError for what is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=LawReport)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} is not a fit ({error}); run `fourfold law fit`") from error


def lines_of(report: LawReport) -> Iterator[str]:
    """The report as Markdown."""
    yield from _runs_lines(report.checks)
    if report.least_tokens:
        yield f"Runs on fewer than {_millions(report.least_tokens)} tokens are left out."
        yield ""
    for name, form in report.forms.items():
        yield from _form_lines(name, form)
    yield from _leverage_lines(report)
    yield from _claim_lines(report)


def _runs_lines(checks: Checks) -> Iterator[str]:
    seeds = "one seed" if checks.seeds == 1 else f"{checks.seeds} seeds"
    steps = ""
    if not isinstance(checks.steps, UnsetType):
        steps = f", {_between([f'{count:,}' for count in checks.steps])} steps"
    active = _between([_millions(count) for count in checks.active])
    tokens = _between([_millions(count) for count in checks.tokens])
    yield f"## {checks.runs} runs of {checks.chains} models, {seeds}"
    yield ""
    yield (
        f"{active} active parameters, ratios {', '.join(map(str, checks.ratios))}, {tokens} "
        f"tokens{steps}."
    )
    yield ""
    yield (
        f"A dense model twice as large loses {100 * (1 - 2**-checks.size_power):.2g} % less, on as "
        f"many tokens. A sparse model loses {100 * checks.sparse_gain:.2g} % less than its dense "
        "twin (median)."
    )
    if isinstance(checks.seed_noise, UnsetType):
        yield "How much of that is luck, these runs do not say: it takes several seeds."
    else:
        yield f"Seeds differ by {100 * checks.seed_noise:.2g} % (standard deviation)."
    yield ""
    for doubt in checks.doubts:
        yield f"- **Doubt**: {doubt}."
    if checks.doubts:
        yield ""


def _form_lines(name: str, form: FormReport) -> Iterator[str]:
    yield f"## {name}: off by {100 * form.error:.2f} % (root mean square of {_runs(form)})"
    yield ""
    values = (f"{key} = {_shown(value)}" for key, value in form.coefficients.items())
    yield "; ".join(values)
    yield ""
    off = "any factor" if isinstance(form.misfit, UnsetType) else f"a factor of {form.misfit:.3g}"
    if form.tells_size:
        yield f"On average its residuals stand for {off} in model size."
    elif "a" in form.untold:
        yield "**No leverage is read from it**: it does not tell the exponent of size."
    else:
        yield (
            "**It does not describe these runs, and no leverage is read from it**: on average its "
            f"residuals stand for {off} in model size. Its intervals hold for a form that does."
        )
    yield ""
    if form.untold:
        untold = ", ".join(name.removeprefix("ln ") for name in form.untold)
        yield f"These runs do not tell {untold}, which came to lie on a bound: extend the grid."
        yield ""
    for held in form.held_out:
        mean = sum(measured for measured, _ in held.runs.values()) / len(held.runs)
        yield (
            f"- without {held.what}: off by {held.error:.4f} nats ({100 * held.error / mean:.2g} "
            f"%) on {len(held.runs)} runs"
        )
    yield ""


def _leverage_lines(report: LawReport) -> Iterator[str]:
    yield f"## Leverage on the most tokens (the {report.best} form fits best)"
    yield ""
    before = ["model", "active", "ratio", "tokens"]
    yield _row([*before, *report.forms, "between dense runs", "in compute", "dense model"])
    yield "|" + "---|" * (7 + len(report.forms))
    for row in on_most_tokens(report.leverages):
        shown = [
            _shown(row.forms[name]) if name in row.forms else _UNKNOWN for name in report.forms
        ]
        how = "interpolated" if row.interpolated else "extrapolated" if row.forms else _UNKNOWN
        compute = _figure(row.compute) if row.forms else _UNKNOWN
        where = [row.model, f"{row.active:,}", str(row.ratio), f"{row.tokens:,}"]
        yield _row([*where, *shown, _direct(row), compute, how])
    yield ""


def _claim_lines(report: LawReport) -> Iterator[str]:
    yield f"## {CLAIMED:g} times on as many tokens"
    yield ""
    yield _row(["tokens", "model", "between dense runs", "by the forms"])
    yield "|---|---|---|---|"
    for claim in report.claims:
        at = "" if isinstance(claim.ratio, UnsetType) else f" at ratio {claim.ratio:.3g}: "
        told = f"{claim.verdict}{at}{_shown(claim.leverage) if at else ''}"
        yield _row([_millions(claim.tokens), claim.model, direct_verdict(claim), told])
    yield ""


def direct_verdict(claim: Claim) -> str:
    """What dense runs say of a claim. Where sparse ones are better than all of them, and that is
    less than claimed, they do not tell."""
    row = claim.direct
    if isinstance(row, UnsetType):
        return _UNKNOWN
    if not isinstance(row.above, UnsetType):
        verdict = "reached" if row.above >= CLAIMED else "not told"
    else:
        assert not isinstance(row.direct, UnsetType)
        verdict = "reached" if row.direct >= CLAIMED else "not reached"
    return f"{verdict} at ratio {row.ratio}: {_direct(row)}"


def _direct(row: Leverage) -> str:
    if not isinstance(row.above, UnsetType):
        return f"> {_figure(row.above)}"
    return _UNKNOWN if isinstance(row.direct, UnsetType) else _figure(row.direct)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _runs(form: FormReport) -> str:
    return f"{len(form.residuals)} runs, {len(form.theta)} coefficients"


def _between(pair: Sequence[str]) -> str:
    return pair[0] if pair[0] == pair[1] else f"{pair[0]} to {pair[1]}"


def _millions(count: float) -> str:
    return f"{count / 1e6:.3g}M"


def _shown(estimate: Estimate) -> str:
    if isinstance(estimate.low, UnsetType) and isinstance(estimate.high, UnsetType):
        return _figure(estimate.value)
    return f"{_figure(estimate.value)} [{_figure(estimate.low)}, {_figure(estimate.high)}]"


def _figure(value: float | UnsetType) -> str:
    """Of an estimate: absent is without bound."""
    return "∞" if isinstance(value, UnsetType) else f"{value:.4g}"
