"""What a run found: shown as a table, written as a record and as one line per request."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fourfold.bench.figures import significant
from fourfold.bench.record import Record, Result, new_record, with_peer
from fourfold.bench.serve.config import ServeBenchConfig
from fourfold.bench.serve.endpoint import Server
from fourfold.bench.serve.measure import PERCENTILES, Outcome, Summary, summarize
from fourfold.files import write_atomically

BUSY_LIMIT = 0.7
"""Share of one core from which on the generator may have delayed what it measured."""

_PACKAGES = ("fourfold", "httptools", "uvloop")


class _Detail(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request of a details file; times in seconds, `due` and `sent` since the first was due."""

    due: float
    sent: float
    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    itl: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int = 0
    rate: float | None = None
    failure: str | None = None
    failure_detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcomes of a run and what is needed to judge them.

    `duration` is in seconds; `busy` is the CPU time of the generator's thread as a share of it;
    `unfinished` counts requests that an interrupted run cut off or never sent; `peer` is another
    server's record of the same load, under its name.
    """

    config: ServeBenchConfig
    server: Server
    outcomes: tuple[Outcome, ...]
    duration: float
    busy: float
    unfinished: int = 0
    notes: tuple[str, ...] = ()
    peer: tuple[str, Record] | None = None

    @cached_property
    def summary(self) -> Summary:
        """The run's figures."""
        return summarize(
            self.outcomes,
            self.duration,
            open_loop=self.config.open_loop,
            slo_ttft=self.config.slo_ttft,
            slo_tpot=self.config.slo_tpot,
        )

    @property
    def failed(self) -> bool:
        """Whether any request failed."""
        return bool(self.summary.failures)

    def results(self) -> list[Result]:
        """The figures as a record holds them. A run that was cut short says so in its case, and
        is not set beside a peer."""
        case = self.config.describe() + (" (partial)" if self.unfinished else "")
        figures = [*self._scalars(), *self._latencies()]
        results = [
            Result(case=case, metric=metric, value=value, unit=unit)
            for metric, value, unit in figures
        ]
        if self.peer is None or self.unfinished:
            return results
        return with_peer(results, *self.peer)

    def details(self) -> list[_Detail]:
        """What is kept of each request, in the order they were due."""
        ordered = sorted(self.outcomes, key=lambda outcome: outcome.due)
        rate = self.config.rate if math.isfinite(self.config.rate) else None
        return [_detail(outcome, ordered[0].due, rate) for outcome in ordered]

    def remarks(self) -> list[str]:
        """What a reader must know before believing the figures, one sentence each."""
        remarks = list(self.notes)
        if self.unfinished:
            remarks.append(f"interrupted: {self.unfinished} requests were not measured")
        counted = sum(o.counted for o in self.outcomes if o.failure is None)
        if counted:
            remarks.append(f"{counted} answers came without usage: their events were counted")
        if self.busy > BUSY_LIMIT:
            remarks.append(
                f"the generator used {self.busy:.0%} of a core: some latency may be its own"
            )
        examples: dict[str, str] = {}
        for outcome in self.outcomes:
            if outcome.failure is not None:
                examples.setdefault(outcome.failure.kind, outcome.failure.detail)
        return remarks + [f"first {kind} failure: {said}" for kind, said in examples.items()]

    def show(self, console: Console) -> None:
        """Prints the table and the remarks."""
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column("unit")
        for heading in ("mean", *(f"p{percent}" for percent in PERCENTILES)):
            table.add_column(heading, justify="right")
        for name, spread in self.summary.latencies.items():
            figures = (spread.mean, *spread.percentiles.values())
            table.add_row(name, "ms", *(significant(1e3 * figure, 4) for figure in figures))
        table.add_section()
        for metric, value, unit in self._scalars():
            shown = f"{value:,}" if isinstance(value, int) else significant(value, 4)
            table.add_row(metric.replace("_", " "), unit, shown)
        title = f"{self.server.model}: {self.config.describe()}"
        console.print(title, style="bold", markup=False, highlight=False)
        console.print(table)
        for remark in self.remarks():
            console.print(remark, markup=False, highlight=False)

    def _scalars(self) -> Iterator[tuple[str, float, str]]:
        """(metric, value, unit) of the figures that are one number."""
        s = self.summary
        attainment = None if s.slo_attainment is None else 100 * s.slo_attainment
        figures: list[tuple[str, float | None, str]] = [
            ("completed", s.completed, "requests"),
            ("failed", sum(s.failures.values()), "requests"),
            *((f"failed_{k.replace(' ', '_')}", n, "requests") for k, n in s.failures.items()),
            ("unfinished", self.unfinished or None, "requests"),
            ("duration", s.duration, "s"),
            ("request_rate", s.request_rate, "req/s"),
            ("goodput", s.goodput, "req/s"),
            ("slo_attainment", attainment, "%"),
            ("input_rate", s.input_rate, "tok/s"),
            ("output_rate", s.output_rate, "tok/s"),
            ("prompt_tokens", s.prompt_tokens, "tokens/req"),
            ("output_tokens", s.output_tokens, "tokens/req"),
            ("peak_concurrency", s.peak_concurrency, "requests"),
            ("generator_busy", 100 * self.busy, "%"),
        ]
        for metric, value, unit in figures:
            if value is not None:
                yield metric, value, unit

    def _latencies(self) -> Iterator[tuple[str, float, str]]:
        """(metric, value, unit) of means and percentiles."""
        for name, spread in self.summary.latencies.items():
            yield f"{name}_mean", spread.mean, "s"
            for percent, value in spread.percentiles.items():
                yield f"{name}_p{percent}", value, "s"


def make_record(config: ServeBenchConfig, reports: Sequence[Report]) -> Record:
    """Runs at one rate or several as one benchmark record; its hardware is the generator's."""
    results = [result for report in reports for result in report.results()]
    record = new_record(config.name, config.command(), results, packages=_PACKAGES)
    server = reports[0].server.software
    if not server:
        return record
    return msgspec.structs.replace(record, software=record.software | {"server": server})


def write_details(reports: Sequence[Report], path: Path) -> None:
    """Writes one JSON line per request, one run after the other."""
    lines = [detail for report in reports for detail in report.details()]
    write_atomically(path, msgspec.json.Encoder().encode_lines(lines))


def show_curve(reports: Sequence[Report], console: Console) -> None:
    """Prints one line for each rate."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("req/s", "requests", "failed", "tok/s"):
        table.add_column(heading, justify="right")
    shown = [(name, p) for name in ("ttft", "tpot", "itl") for p in (50, 99)]
    for name, percent in shown:
        table.add_column(f"{name}\np{percent} ms", justify="right")
    for report in reports:
        s = report.summary
        latencies = [
            significant(1e3 * s.latencies[name].percentiles[percent]) if name in s.latencies else ""
            for name, percent in shown
        ]
        counts = (str(s.completed), str(sum(s.failures.values())))
        rate = f"{report.config.rate:g}"
        table.add_row(rate, *counts, significant(s.output_rate), *latencies)
    console.print(table)


def _detail(outcome: Outcome, start: float, rate: float | None) -> _Detail:
    failure = outcome.failure
    return _Detail(
        due=outcome.due - start,
        sent=outcome.sent - start,
        ttft=outcome.ttft,
        tpot=outcome.tpot,
        e2e=outcome.e2e,
        itl=outcome.gaps,
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.output_tokens,
        rate=rate,
        failure=None if failure is None else failure.kind,
        failure_detail=None if failure is None else failure.detail,
    )
