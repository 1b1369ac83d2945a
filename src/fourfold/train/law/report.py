"""What `fourfold law fit` writes: everything that plots and advice need, as JSON, and as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import UnsetType

from fourfold.errors import ConfigError
from fourfold.files import write_atomically
from fourfold.train.law.fitting import DELTA, Fit, HeldOut, fit, hold_out, interval
from fourfold.train.law.forms import Form, coefficients
from fourfold.train.law.leverage import CLAIMED, Claim, Estimate, Leverage, claims, leverages
from fourfold.train.law.records import RunRecord

FORMS = ("per-ratio", "joint")


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
    residuals: dict[str, float]
    """Log of measured over predicted loss, by run."""
    theta: tuple[float, ...]
    sampled: tuple[tuple[float, ...], ...]
    held_out: tuple[HeldOutReport, ...]


class LawReport(msgspec.Struct, frozen=True, kw_only=True):
    """All of a fit. `delta` is that of Huber's loss."""

    starts: int
    resamplings: int
    seed: int
    delta: float
    best: str
    """The form that fits best: by it dense models are called interpolated or extrapolated."""
    forms: dict[str, FormReport]
    leverages: tuple[Leverage, ...]
    claims: tuple[Claim, ...]


def make_report(
    records: Sequence[RunRecord], *, starts: int, resamplings: int, seed: int
) -> LawReport:
    """Fits all forms. ConfigError for too few runs."""
    fits = [fit(records, form, starts=starts, resamplings=resamplings, seed=seed) for form in FORMS]
    # What is said of leverages is said by the form that fits best.
    best = sorted(fits, key=lambda each: float(np.square(each.residual_N).sum()))
    found = leverages(records, best)
    reports = {}
    for fitted in fits:
        held_out = hold_out(records, fitted.form.name, starts=starts, seed=seed)
        reports[fitted.form.name] = _form_report(records, fitted, held_out)
    return LawReport(
        starts=starts,
        resamplings=resamplings,
        seed=seed,
        delta=DELTA,
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
    for name, form in report.forms.items():
        yield f"## {name}: off by {100 * form.error:.2f} % (root mean square of {_runs(form)})"
        yield ""
        values = (f"{key} = {_shown(value)}" for key, value in form.coefficients.items())
        yield "; ".join(values)
        yield ""
        if form.untold:
            yield f"These runs do not tell {', '.join(form.untold)}: extend the grid."
            yield ""
        for held in form.held_out:
            yield f"- without {held.what}: off by {held.error:.4f} nats on {len(held.runs)} runs"
        yield ""
    yield f"## Leverage at equal tokens (the {report.best} form fits best)"
    yield ""
    before = ["model", "active", "ratio", "tokens"]
    yield _row([*before, *report.forms, "between dense runs", "in compute", "dense model"])
    yield "|" + "---|" * (7 + len(report.forms))
    for row in report.leverages:
        shown = [_shown(row.forms.get(name, Estimate())) for name in report.forms]
        how = "interpolated" if row.interpolated else "extrapolated" if row.forms else "-"
        figures = [*shown, _figure(row.direct), _figure(row.compute)]
        where = [row.model, f"{row.active:,}", str(row.ratio), f"{row.tokens:,}"]
        yield _row([*where, *figures, how])
    yield ""
    for claim in report.claims:
        at = "" if isinstance(claim.ratio, UnsetType) else f" at ratio {claim.ratio:.3g}: "
        value = _shown(claim.leverage) if at else ""
        yield f"- {CLAIMED:g} times, {claim.model}: {claim.verdict}{at}{value}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _runs(form: FormReport) -> str:
    return f"{len(form.residuals)} runs, {len(form.theta)} coefficients"


def _shown(estimate: Estimate) -> str:
    if isinstance(estimate.low, UnsetType) and isinstance(estimate.high, UnsetType):
        return _figure(estimate.value)
    return f"{_figure(estimate.value)} [{_figure(estimate.low)}, {_figure(estimate.high)}]"


def _figure(value: float | UnsetType) -> str:
    return "-" if isinstance(value, UnsetType) else f"{value:.4g}"
