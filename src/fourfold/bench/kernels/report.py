"""One case checked and timed, as a line to read and as figures of a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import msgspec

from fourfold.bench.figures import format_figure, significant
from fourfold.bench.kernels.case import Case
from fourfold.bench.kernels.timing import Timer, Timing
from fourfold.bench.record import Result
from fourfold.kernels.tolerance import tolerance

_COLUMNS = (
    ("kernel", 26),
    ("case", 46),
    ("time", -9),
    ("spread", -7),
    ("rate", -14),
    ("of the ceiling", -22),
    ("of the baseline", -28),
    ("error", -9),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """The baseline of a case."""

    name: str
    timing: Timing
    rate: float
    """TFLOP/s or TB/s."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one case gave."""

    case: Case
    timing: Timing
    rate: float
    """TFLOP/s or TB/s."""
    error: float | None
    peer: Peer | None

    @property
    def unit(self) -> str:
        return f"T{self.case.unit}/s"


class WrongResultError(Exception):
    """A kernel whose result differs from its reference by more than its recipe allows, or whose
    time is lost in noise."""


def check(case: Case) -> float | None:
    """The case's error, None where it has none to offer. Raises `WrongResultError`."""
    if case.error is None:
        return None
    error, allowed = case.error(), tolerance(case.kernel, case.case)
    if not error <= allowed:  # also where it is not a number
        raise WrongResultError(
            f"{case.kernel} ({case.case}) is off by {error:.2g} of its reference, more than the "
            f"{allowed:.2g} that its recipe allows"
        )
    return error


def measure(case: Case, timer: Timer) -> Measured:
    """Checks a case, then times it in turns with its baseline. Raises `WrongResultError`."""
    error = check(case)
    calls = [case.run] if case.baseline is None else [case.run, case.baseline]
    ours, *others = timer(calls, graph=case.graph)
    if min(timing.seconds for timing in (ours, *others)) <= 0:
        raise WrongResultError(
            f"{case.kernel} ({case.case}) or its baseline took no time beside emptying the cache; "
            "measure on a GPU that does nothing else"
        )
    peer = None
    if others:
        assert case.baseline_name is not None, f"the baseline of {case.kernel} has no name"
        work = case.work if case.baseline_work is None else case.baseline_work
        peer = Peer(name=case.baseline_name, timing=others[0], rate=work / others[0].seconds / 1e12)
    return Measured(
        case=case,
        timing=ours,
        rate=case.work / ours.seconds / 1e12,
        error=error,
        peer=peer,
    )


def header() -> str:
    """The names of the columns of `line`."""
    return _row(*(name for name, _ in _COLUMNS))


def line(measured: Measured, ceilings: Mapping[str, float]) -> str:
    """One case as a line of the table; ceilings by name in TFLOP/s or TB/s."""
    case, peer = measured.case, measured.peer
    limit = ceilings.get(case.ceiling)
    return _row(
        case.kernel,
        case.case,
        format_figure(measured.timing.seconds, "s"),
        f"{measured.timing.spread:.1%}",
        f"{significant(measured.rate)} {measured.unit}",
        "" if limit is None else f"{measured.rate / limit:.2f} {case.ceiling}",
        "" if peer is None else f"{measured.rate / peer.rate:.2f} {peer.name}",
        "" if measured.error is None else f"{measured.error:.1e}",
    )


def results(measured: Measured, ceilings: Mapping[str, float]) -> list[Result]:
    """The figures of one case for the record; ceilings by name in TFLOP/s or TB/s."""
    case, peer = f"{measured.case.kernel}, {measured.case.case}", measured.peer
    rate = Result(case=case, metric="rate", value=measured.rate, unit=measured.unit)
    time = Result(case=case, metric="time", value=measured.timing.seconds, unit="s")
    if (limit := ceilings.get(measured.case.ceiling)) is not None:
        rate = _replace(rate, limit=limit, limit_name=measured.case.ceiling)
    if peer is not None:
        rate = _replace(rate, peer=peer.name, peer_value=peer.rate)
        time = _replace(time, peer=peer.name, peer_value=peer.timing.seconds)
    if (mark := _mark(measured, limit)) is not None:
        rate = _replace(rate, mark=mark)
    spread = 100 * measured.timing.spread
    figures = [rate, time, Result(case=case, metric="spread", value=spread, unit="%")]
    if measured.error is not None:
        figures.append(Result(case=case, metric="error", value=measured.error, unit="relative"))
    return figures


def _mark(measured: Measured, limit: float | None) -> float | None:
    """The rate that is to be reached, in TFLOP/s or TB/s."""
    case, peer = measured.case, measured.peer
    of = limit if peer is None or case.mark_of_ceiling else peer.rate
    return None if case.mark is None or of is None else case.mark * of


def _row(*cells: str) -> str:
    widths = [width for _, width in _COLUMNS]
    padded = (
        cell.rjust(-width) if width < 0 else cell.ljust(width)
        for cell, width in zip(cells, widths, strict=True)
    )
    return "  ".join(padded).rstrip()


def _replace(result: Result, **fields: str | float) -> Result:
    return msgspec.structs.replace(result, **fields)
