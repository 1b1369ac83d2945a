"""The device's own timeline: when it computed, when it waited, and for what.

Recorded by torch's profiler with nothing but the device's activities, in a pass of its own, for
recording makes steps a little slower. Kernels of one CUDA graph are one launch: what lies between
them is their own (a kernel's start and end); what lies between launches is the host's doing.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

_BUSY = ("kernel", "gpu_memcpy", "gpu_memset")
_LONGEST_NAME = 60


@dataclasses.dataclass(frozen=True)
class Activity:
    """A kernel or a copy: seconds on the device's clock, and the launch that it is part of."""

    name: str
    start: float
    end: float
    launch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idle:
    """Seconds that a device did nothing, in a window of so many seconds."""

    window: float
    within: float
    """Between the kernels of one launch."""
    between: float
    """Between launches."""


class _Arguments(msgspec.Struct):
    correlation: int = -1


class _Event(msgspec.Struct):
    name: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    args: _Arguments = msgspec.field(default_factory=_Arguments)


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]


def record(action: Callable[[], object]) -> list[Activity]:
    """What the device did while `action` ran, in order; that it started before is cut off."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(path.read_bytes())


def settled(activities: Sequence[Activity], launches: int) -> list[Activity]:
    """Without so many launches at the beginning: a recorder that starts keeps the host from
    launching for a moment, which is none of the host's doing otherwise."""
    first = list(dict.fromkeys(activity.launch for activity in activities))[:launches]
    return [activity for activity in activities if activity.launch not in first]


def read_trace(data: bytes) -> list[Activity]:
    """The device's activities of a Chrome trace, in order of their start."""
    events = msgspec.json.decode(data, type=_Trace, strict=False).traceEvents
    activities = [
        Activity(e.name, e.ts / 1e6, (e.ts + e.dur) / 1e6, e.args.correlation)
        for e in events
        if e.cat in _BUSY
    ]
    return sorted(activities, key=lambda activity: activity.start)


def idle(activities: Sequence[Activity]) -> Idle:
    """What lies between at least two activities; those that overlap are one."""
    end = activities[0].end
    within = between = 0.0
    for before, activity in pairwise(activities):
        gap = max(0.0, activity.start - end)
        if activity.launch == before.launch:
            within += gap
        else:
            between += gap
        end = max(end, activity.end)
    return Idle(window=end - activities[0].start, within=within, between=between)


def by_kernel(activities: Sequence[Activity]) -> str:
    """A Markdown table of what the device spent its time on, the most first.

    Kernels that start before the one in front of them has ended wait for it most of that time. What
    counts is the time from the end of all before, so that the sum is the time the device was busy;
    and what a kernel came after, for one kernel does several things.
    """
    spent: dict[tuple[str, str], list[float]] = {}
    ended, before = float("-inf"), ""
    for activity in sorted(activities, key=lambda activity: activity.end):
        alone = activity.end - max(activity.start, ended)
        spent.setdefault((activity.name, before), []).append(alone)
        ended, before = activity.end, activity.name
    whole = sum(map(sum, spent.values()))
    lines = [
        "| kernel | after | calls | mean us | ms | share |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for names, seconds in sorted(spent.items(), key=lambda entry: -sum(entry[1])):
        total = sum(seconds)
        name, after = (each[:_LONGEST_NAME].replace("|", " ") for each in names)
        lines.append(
            f"| {name} | {after} | {len(seconds)} | {1e6 * total / len(seconds):.2f} | "
            f"{1e3 * total:.3f} | {total / whole:.1%} |"
        )
    return "\n".join(lines) + "\n"
