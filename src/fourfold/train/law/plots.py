"""Figures of the law: losses, leverage, the fitted surface and residuals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import UnsetType

from fourfold.errors import ConfigError
from fourfold.train.law.fitting import Fit
from fourfold.train.law.forms import Points
from fourfold.train.law.leverage import CLAIMED, Estimate, on_most_tokens
from fourfold.train.law.records import RunRecord
from fourfold.train.law.report import LawReport, fit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DRAWN = 100
"""Points of a curve."""


def draw(report: LawReport, records: Sequence[RunRecord], folder: Path, ending: str) -> list[Path]:
    """Writes all figures; the same report gives the same files. ConfigError without matplotlib, or
    where the records are not those of the report."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("figures need `pip install matplotlib`") from error
    known = set(next(iter(report.forms.values())).residuals)
    if known != {record.name for record in records}:
        raise ConfigError("the fit is of other records; run `fourfold law fit` again")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"svg.hashsalt": "fourfold", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    paths = []
    with matplotlib.rc_context(settings):
        for name, figure in _figures(report, records):
            paths.append(folder / f"{name}.{ending}")
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending, {})
            figure.savefig(paths[-1], metadata=metadata, bbox_inches="tight", dpi=150)
    return paths


def _figures(report: LawReport, records: Sequence[RunRecord]) -> Iterator[tuple[str, Figure]]:
    from matplotlib.figure import Figure

    joint = fit_of(report, "joint")
    figure = Figure(figsize=(10, 4))
    by_size, by_tokens = figure.subplots(1, 2)
    _losses_by_size(by_size, joint, records)
    _losses_by_tokens(by_tokens, joint, records)
    yield "losses", figure
    figure = Figure(figsize=(5.5, 4))
    _leverage(figure.subplots(), report)
    yield "leverage", figure
    figure = Figure(figsize=(5.5, 4))
    _surface(figure, figure.subplots(), joint, records)
    yield "surface", figure
    figure = Figure(figsize=(10, 4))
    for axes, name in zip(figure.subplots(1, len(report.forms)), report.forms, strict=True):
        _residuals(axes, report, name, records)
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
    axes.legend()


def _losses_by_tokens(axes: Axes, fit: Fit, records: Sequence[RunRecord]) -> None:
    size = max((r for r in records if r.ratio > 1), key=lambda record: record.active).model
    for color, ratio in enumerate(_ratios(records)):
        own = sorted(
            (record for record in records if record.ratio == ratio and record.model == size),
            key=lambda record: record.tokens,
        )
        if not own:
            continue
        tokens = [record.tokens for record in own]
        axes.scatter(tokens, [record.loss for record in own], s=16, color=f"C{color}")
        reach = np.geomspace(min(tokens), max(tokens), _DRAWN)
        place = Points(np.full(_DRAWN, float(own[0].active)), np.full(_DRAWN, ratio), reach)
        axes.plot(reach, fit.loss(place), color=f"C{color}", lw=1, label=_named(ratio))
    axes.set(xscale="log", xlabel="tokens", title=f"{size} active parameters")
    axes.legend()


def _leverage(axes: Axes, report: LawReport) -> None:
    """Full marks are interpolated, hollow ones extrapolated; crosses are between dense runs."""
    found = on_most_tokens(report.leverages)
    for color, model in enumerate(dict.fromkeys(row.model for row in found)):
        rows = [row for row in found if row.model == model]
        for row in rows:
            estimate = row.forms.get("joint", Estimate())
            if isinstance(estimate.value, UnsetType):
                continue
            bounds = [estimate.low, estimate.high]
            low, high = (estimate.value if isinstance(b, UnsetType) else b for b in bounds)
            # A resampled law may lie wholly on one side of the fitted one.
            reach = [[max(0.0, estimate.value - low)], [max(0.0, high - estimate.value)]]
            face = f"C{color}" if row.interpolated else "none"
            axes.errorbar(
                row.ratio, estimate.value, reach, fmt="o", ms=5, color=f"C{color}", mfc=face
            )
            if not isinstance(row.direct, UnsetType):
                axes.scatter(row.ratio, row.direct, marker="x", color=f"C{color}", s=30)
        known = [(r.ratio, r.forms.get("joint", Estimate()).value) for r in rows]
        line = [(x, y) for x, y in known if not isinstance(y, UnsetType)]
        axes.plot([x for x, _ in line], [y for _, y in line], color=f"C{color}", lw=1, label=model)
    axes.axhline(CLAIMED, color="grey", ls="--", lw=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="experts for each that is chosen",
        ylabel="leverage: dense over active parameters",
        title="for the same loss on the same tokens",
    )
    ratios = sorted({row.ratio for row in report.leverages})
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axes.minorticks_off()
    marks = [1, 2, 3, 4, 5, 7, 10, 15, 20]
    axes.set_yticks(marks, [str(mark) for mark in marks])
    axes.legend(title="model")


def _surface(figure: Figure, axes: Axes, fit: Fit, records: Sequence[RunRecord]) -> None:
    tokens = max(record.tokens for record in records)
    sizes = np.geomspace(min(r.active for r in records), max(r.active for r in records), _DRAWN)
    ratios = np.geomspace(1, max(record.ratio for record in records), _DRAWN)
    size_RN, ratio_RN = np.meshgrid(sizes, ratios)
    flat = Points(size_RN.ravel(), ratio_RN.ravel(), np.full(size_RN.size, tokens))
    levels = axes.contourf(size_RN, ratio_RN, fit.loss(flat).reshape(size_RN.shape), 24)
    figure.colorbar(levels, ax=axes, label="loss, nats a token")
    run = [record for record in records if record.tokens > 0.9 * tokens]
    axes.scatter([r.active for r in run], [r.ratio for r in run], s=12, color="white", ec="black")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="active parameters",
        ylabel="experts for each that is chosen",
        title=f"{tokens / 1e6:,.0f} M tokens, joint form (dots: runs)",
    )


def _residuals(axes: Axes, report: LawReport, name: str, records: Sequence[RunRecord]) -> None:
    residuals = report.forms[name].residuals
    for color, ratio in enumerate(_ratios(records)):
        own = [record for record in records if record.ratio == ratio]
        values: list[Any] = [100 * residuals[record.name] for record in own]
        axes.scatter(
            [record.active for record in own], values, s=14, color=f"C{color}", label=_named(ratio)
        )
    axes.axhline(0, color="grey", lw=1)
    axes.set(
        xscale="log",
        xlabel="active parameters",
        ylabel="measured over predicted loss, %",
        title=f"{name}: {100 * report.forms[name].error:.2g} %",
    )
    axes.legend()


def _ratios(records: Sequence[RunRecord]) -> list[int]:
    return sorted({record.ratio for record in records})


def _named(ratio: int) -> str:
    return "dense" if ratio == 1 else f"1 of {ratio}"
