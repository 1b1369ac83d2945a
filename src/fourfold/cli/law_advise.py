"""`fourfold law advise`: the sparsity that loses least within budgets of training and serving."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fourfold.errors import ConfigError
from fourfold.train.law.config import AdviseConfig as Options

if TYPE_CHECKING:
    from fourfold.train.law.advise import Advice
    from fourfold.train.law.fitting import Fit

__all__ = ["Options", "run"]

_COLUMNS = (
    "ratio",
    "active",
    "95 %",
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
_FAR = 3.0
"""Times beyond what was run from which on a foretold loss is called a guess."""


def run(options: Options) -> int:
    from rich.console import Console
    from rich.table import Table

    from fourfold.train.law.advise import SEARCH, advise, costs_for, ratios_for
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
    if best.bound == SEARCH:
        flops = [record.flops_per_token * record.tokens for record in records]
        raise ConfigError(
            f"no advice: the best size of ratio {best.ratio:g} lies at the end of the search "
            f"({_count(best.active)} active), where this law foretells nothing; the runs took "
            f"{min(flops):.2g} to {max(flops):.2g} FLOPs each: bring --flops nearer to them, or "
            "extend the grid"
        )
    low, high = best.sizes
    print(
        f"take ratio {best.ratio:g}: {_count(best.active)} active (95 %: {_count(low)} to "
        f"{_count(high)}) of {_count(best.total)}"
    )
    for doubt in _doubts(found, fit):
        print(doubt, file=sys.stderr)
    return 0


def _doubts(found: Sequence[Advice], fit: Fit) -> Iterator[str]:
    from fourfold.train.law.advise import SEARCH

    best = found[0]
    if best.beyond:
        yield f"this is an extrapolation in {_outside(best)}"
    if any(factor > _FAR for factor in best.beyond.values()):
        yield f"more than {_FAR:g} times beyond what was run, it is a guess"
    if ended := [f"{advice.ratio:g}" for advice in found if advice.bound == SEARCH]:
        yield f"the search ended before the best size of ratio {', '.join(ended)}: not judged"
    if fit.untold:
        untold = ", ".join(name.removeprefix("ln ") for name in fit.untold)
        yield f"the runs do not tell {untold}: losses and sizes beyond them are guesses"


def _outside(advice: Advice) -> str:
    return ", ".join(f"{name} ({_count(factor)} times)" for name, factor in advice.beyond.items())


def _cells(advice: Advice) -> list[str]:
    return [
        f"{advice.ratio:g}",
        _count(advice.active),
        f"{_count(advice.sizes[0])} to {_count(advice.sizes[1])}",
        _count(advice.total),
        _count(advice.tokens),
        f"{advice.loss:.4f}",
        f"{advice.low:.4f} to {advice.high:.4f}",
        _count(advice.dense) if advice.dense < math.inf else "none",
        f"{advice.memory / 2**20:,.0f} MiB",
        f"{advice.step * 1e3:.3g} ms",
        advice.bound,
        ", ".join(advice.beyond) or "-",
    ]


def _count(value: float) -> str:
    if math.isinf(value):
        return "∞"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
