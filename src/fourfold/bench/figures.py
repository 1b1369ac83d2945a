"""How a figure is read: which direction is better in its unit, and how many digits to show."""

from __future__ import annotations

import math

from fourfold.bench.record import Result

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_SIZES = frozenset({"B", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"})
_RATES = frozenset({"GFLOPS", "TFLOPS", "PFLOPS", "TOPS"})


def ratio(value: float, other: float, unit: str) -> float | None:
    """How many times better `value` is than `other`; None where that has no meaning.

    Less is better for times and sizes, also per something ("ms/token"); more is better for what
    happens per second ("tok/s", "GB/s", "TFLOPS"). No other unit has a better direction.
    """
    head, *per = unit.split("/")
    if value <= 0 or other <= 0:
        return None
    if "s" in per or unit in _RATES:
        return value / other
    if head in _SECONDS or head in _SIZES:
        return other / value
    return None


def format_figure(value: float, unit: str) -> str:
    """A figure with its unit, to three significant digits: times in whichever of s, ms, us and ns
    suits them, whole counts in full."""
    if unit in _SECONDS:
        seconds = float(f"{value * _SECONDS[unit]:.3g}")
        fitting = (name for name, size in _SECONDS.items() if abs(seconds) >= size)
        unit = next(fitting, "ns") if seconds else unit
        return f"{significant(seconds / _SECONDS[unit])} {unit}"
    if float(value).is_integer() and unit not in _SIZES and "/" not in unit:
        return f"{value:,.0f} {unit}"
    return f"{significant(value)} {unit}"


def significant(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, never in exponent form: 6480, 14.2, 0.0310."""
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def result_line(result: Result, metric_width: int) -> str:
    """A figure as a line to read: its case, its metric, its value, and its share of the peer's."""
    peer = ""
    if isinstance(result.peer_value, float):
        share = result.value / result.peer_value
        peer = f"  {share:.2f} of {format_figure(result.peer_value, result.unit)} ({result.peer})"
    value = format_figure(result.value, result.unit)
    return f"{result.case}  {result.metric:<{metric_width}}{value:>12}{peer}"
