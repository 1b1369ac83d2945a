"""Figures of the law: losses, leverage, the fitted surface and residuals."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import UnsetType

from fourfold.errors import ConfigError
from fourfold.train.figures import write_figures
from fourfold.train.law.checks import dense_twins
from fourfold.train.law.fitting import Fit
from fourfold.train.law.forms import Points
from fourfold.train.law.leverage import CLAIMED, Estimate, Leverage, on_most_tokens
from fourfold.train.law.records import RunRecord
from fourfold.train.law.report import LawReport, fit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_DRAWN = 100
"""Points of a curve."""
_LOWEST, _HIGHEST = 0.5, 50.0
"""Leverages that are drawn."""
_APART = 1.06
"""Between the ratios at which two sizes are drawn."""


def draw(report: LawReport, records: Sequence[RunRecord], folder: Path, ending: str) -> list[Path]:
    """Writes all figures; the same report gives the same files. ConfigError without matplotlib, or
    where the records are not those of the report."""
    known = set(next(iter(report.forms.values())).residuals)
    if known != {record.name for record in records}:
        raise ConfigError("the fit is of other records; run `fourfold law fit` again")
    return write_figures(_figures(report, records), folder, ending)


def _figures(report: LawReport, records: Sequence[RunRecord]) -> Iterator[tuple[str, Figure]]:
    from matplotlib.figure import Figure

    joint = fit_of(report, "joint")
    figure = Figure(figsize=(10, 4))
    by_size, by_tokens = figure.subplots(1, 2)
    _losses_by_size(by_size, joint, records)
    _losses_by_tokens(by_tokens, joint, records)
    yield "losses", figure
    figure = Figure(figsize=(6.5, 4.5))
    _leverage(figure.subplots(), report)
    yield "leverage", figure
    figure = Figure(figsize=(5.5, 4))
    _surface(figure, figure.subplots(), joint, records)
    yield "surface", figure
    figure = Figure(figsize=(10, 7))
    rows = figure.subplots(len(report.forms), 2, sharey="row")
    for (by_size, by_tokens), name in zip(rows, report.forms, strict=True):
        _residuals(by_size, report, name, records, "active")
        _residuals(by_tokens, report, name, records, "tokens")
    rows[0][1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    yield "residuals", figure


def _losses_by_size(axes: Axes, fit: Fit, records: Sequence[RunRecord]) -> None:
    tokens = max(record.tokens for record in records)
    longest = [record for record in records if record.tokens > 0.9 * tokens]
    for color, ratio in enumerate(_ratios(records)):
        own = [record for record in longest if record.ratio == ratio]
        sizes = [record.active for record in own]
        if not own:
            continue
        axes.scatter(sizes, [record.loss for record in own], s=16, color=f"C{color}")
        reach = np.geomspace(min(sizes), max(sizes), _DRAWN)
        line = fit.loss(Points(reach, np.full(_DRAWN, ratio), np.full(_DRAWN, tokens)))
        axes.plot(reach, line, color=f"C{color}", lw=1, label=_named(ratio))
    axes.set(
        xscale="log",
        xlabel="active parameters, without embedding and head",
        ylabel="held-out loss, nats a token",
        title=f"{tokens / 1e6:,.0f} M tokens (lines: joint form)",
    )
    _count_ticks(axes.xaxis)
    axes.legend()


def _losses_by_tokens(axes: Axes, fit: Fit, records: Sequence[RunRecord]) -> None:
    largest = max((r for r in records if r.ratio > 1), key=lambda record: record.active)
    alike = [r for r in records if r.ratio > 1 and r.model == largest.model]
    alike += dense_twins(largest, records)
    for color, ratio in enumerate(_ratios(records)):
        own = sorted((r for r in alike if r.ratio == ratio), key=lambda record: record.tokens)
        if not own:
            continue
        tokens = [record.tokens for record in own]
        axes.scatter(tokens, [record.loss for record in own], s=16, color=f"C{color}")
        reach = np.geomspace(min(tokens), max(tokens), _DRAWN)
        place = Points(np.full(_DRAWN, float(own[0].active)), np.full(_DRAWN, ratio), reach)
        axes.plot(reach, fit.loss(place), color=f"C{color}", lw=1, label=_named(ratio))
    axes.set(
        xscale="log",
        xlabel="tokens",
        ylabel="held-out loss, nats a token",
        title=f"{largest.model} and its dense twin (lines: joint form)",
    )
    _count_ticks(axes.xaxis, {record.tokens for record in records})
    axes.legend()


def _leverage(axes: Axes, report: LawReport) -> None:
    """On the most tokens. Points are the joint form's, with their intervals: what goes on beyond
    the figure is an arrow."""
    found = on_most_tokens(report.leverages)
    models = list(dict.fromkeys(row.model for row in found))
    for color, model in enumerate(models):
        rows = [row for row in found if row.model == model]
        # Beside each other: several sizes have the same ratios.
        shift = _APART ** (color - (len(models) - 1) / 2)
        style: dict[str, Any] = {"color": f"C{color}", "clip_on": False}
        axes.plot([], [], "s", color=f"C{color}", label=model)
        line = []
        for row in rows:
            x = row.ratio * shift
            if "joint" in row.forms:
                line.append((x, _estimate(axes, x, row, row.forms["joint"], style)))
            if not isinstance(row.direct, UnsetType):
                axes.plot(x, min(row.direct, _HIGHEST), "x", ms=6, **style)
            if not isinstance(row.above, UnsetType):
                axes.plot(x, min(row.above, _HIGHEST), "^", ms=6, mfc="none", **style)
        axes.plot([x for x, _ in line], [y for _, y in line], lw=1, color=f"C{color}")
    axes.axhline(CLAIMED, color="grey", ls="--", lw=1)
    for mark, face, meaning in (
        ("o", "grey", "joint form, interpolated"),
        ("o", "none", "joint form, extrapolated"),
        ("x", "grey", "between dense runs"),
        ("^", "none", "more than this: no dense run is as good"),
    ):
        axes.plot([], [], mark, color="grey", mfc=face, label=meaning)
    tokens = max(row.tokens for row in found)
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(_LOWEST, _HIGHEST),
        xlabel="experts for each that is chosen",
        ylabel="leverage: dense over active parameters",
        title=f"for the same loss on {tokens / 1e6:,.0f} M tokens",
    )
    ratios = sorted({row.ratio for row in found})
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    marks = [0.5, 1, 2, 3, 5, 7, 10, 20, 50]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _estimate(
    axes: Axes, x: float, row: Leverage, estimate: Estimate, style: dict[str, Any]
) -> float:
    """Draws one with its interval; returns its height."""
    low, value, high = (
        _HIGHEST if isinstance(figure, UnsetType) else min(max(figure, _LOWEST), _HIGHEST)
        for figure in (estimate.low, estimate.value, estimate.high)
    )
    axes.plot([x, x], [min(low, value), max(high, value)], lw=1, **style)
    for end, mark in ((low, "v"), (high, "^")):
        if end in (_LOWEST, _HIGHEST):
            axes.plot(x, end, mark, ms=4, **style)
    face = style["color"] if row.interpolated else "white"
    axes.plot(x, value, "o", ms=5, mfc=face, **style)
    return value


def _surface(figure: Figure, axes: Axes, fit: Fit, records: Sequence[RunRecord]) -> None:
    tokens = max(record.tokens for record in records)
    sizes = np.geomspace(min(r.active for r in records), max(r.active for r in records), _DRAWN)
    ratios = np.geomspace(1, max(record.ratio for record in records), _DRAWN)
    size_RN, ratio_RN = np.meshgrid(sizes, ratios)
    flat = Points(size_RN.ravel(), ratio_RN.ravel(), np.full(size_RN.size, tokens))
    levels = axes.contourf(size_RN, ratio_RN, fit.loss(flat).reshape(size_RN.shape), 24)
    figure.colorbar(levels, ax=axes, label="loss, nats a token")
    run = [record for record in records if record.tokens > 0.9 * tokens]
    places = [r.active for r in run], [r.ratio for r in run]
    axes.scatter(*places, s=12, color="white", ec="black", clip_on=False, zorder=3)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="active parameters",
        ylabel="experts for each that is chosen",
        title=f"{tokens / 1e6:,.0f} M tokens, joint form (dots: runs)",
    )
    _count_ticks(axes.xaxis)
    _count_ticks(axes.yaxis, {record.ratio for record in records})


def _residuals(
    axes: Axes, report: LawReport, name: str, records: Sequence[RunRecord], by: str
) -> None:
    """By active parameters or tokens."""
    form = report.forms[name]
    for color, ratio in enumerate(_ratios(records)):
        own = [record for record in records if record.ratio == ratio]
        values: list[Any] = [100 * form.residuals[record.name] for record in own]
        places = [getattr(record, by) for record in own]
        axes.scatter(places, values, s=14, color=f"C{color}", label=_named(ratio))
    axes.axhline(0, color="grey", lw=1)
    verdict = "" if form.tells_size else ", tells no leverage"
    axes.set(
        xscale="log",
        xlabel="tokens" if by == "tokens" else "active parameters",
        ylabel="measured over predicted loss, %",
        title=f"{name}: off by {100 * form.error:.2g} %{verdict}",
    )
    _count_ticks(axes.xaxis, {record.tokens for record in records} if by == "tokens" else ())


def _count_ticks(axis: Axis, values: Collection[float] = ()) -> None:
    """Ticks of a logarithmic axis as 3, 3M and so on: at the values, or at some of all."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(
        FixedLocator(sorted(values)) if values else LogLocator(subs=(1.0, 2.0, 5.0))
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1e6:.3g}M" if value >= 1e5 else f"{value:g}")
    )


def _ratios(records: Sequence[RunRecord]) -> list[int]:
    return sorted({record.ratio for record in records})


def _named(ratio: int) -> str:
    return "dense" if ratio == 1 else f"1 of {ratio}"
