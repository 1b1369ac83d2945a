"""`fourfold law advise`: the sparsity that loses least within budgets of training and serving."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fourfold.errors import ConfigError
from fourfold.train.law.config import AdviseConfig as Options

if TYPE_CHECKING:
    from fourfold.train.law.advise import Advice

__all__ = ["Options", "run"]

_COLUMNS = (
    "ratio",
    "active",
    "total",
    "tokens",
    "loss",
    "95 %",
    "as a dense",
    "weights",
    "step",
    "bound by",
    "outside the runs",
)


def run(options: Options) -> int:
    from rich.console import Console
    from rich.table import Table

    from fourfold.train.law.advise import advise, costs_for, ratios_for
    from fourfold.train.law.records import read_records
    from fourfold.train.law.report import fit_of, read_report

    report = read_report(options.fit)
    fit = fit_of(report, "joint")
    folder = options.records or options.fit.parent / "records"
    records = read_records(folder, least_tokens=report.least_tokens)
    found = advise(options, fit, records, ratios_for(records))
    if not found:
        raise ConfigError("no model is within these budgets; raise --memory-gib or --step-ms")
    costs = costs_for(options)
    table = Table(*_COLUMNS, box=None)
    for advice in found:
        table.add_row(*_cells(advice))
    Console(width=160).print(table)
    print(f"steps are priced by {costs.hardware}: {costs.origin}", file=sys.stderr)
    best = found[0]
    print(f"take ratio {best.ratio:g}: {_count(best.active)} active of {_count(best.total)}")
    if best.beyond:
        print(f"this is an extrapolation in {', '.join(best.beyond)}", file=sys.stderr)
    if fit.untold:
        untold = ", ".join(name.removeprefix("ln ") for name in fit.untold)
        print(f"the runs do not tell {untold}: losses beyond them are guesses", file=sys.stderr)
    return 0


def _cells(advice: Advice) -> list[str]:
    return [
        f"{advice.ratio:g}",
        _count(advice.active),
        _count(advice.total),
        _count(advice.tokens),
        f"{advice.loss:.4f}",
        f"{advice.low:.4f} to {advice.high:.4f}",
        _count(advice.dense) if advice.dense < float("inf") else "none",
        f"{advice.memory / 2**20:,.0f} MiB",
        f"{advice.step * 1e3:.3g} ms",
        advice.bound,
        ", ".join(advice.beyond) or "-",
    ]


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
