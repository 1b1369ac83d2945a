"""The device's timeline, read from a Chrome trace."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fourfold.bench.offline.trace import Activity, by_kernel, idle, read_trace, settled


def event(name: str, category: str, start: float, length: float, launch: int) -> dict[str, Any]:
    times = {"ph": "X", "ts": start, "dur": length, "pid": 0, "tid": 7}
    return {"name": name, "cat": category, "args": {"correlation": launch, "device": 0}, **times}


TRACE = {
    "schemaVersion": 1,
    "deviceProperties": [{"id": 0}],
    "traceEvents": [
        {"ph": "M", "name": "process_name", "pid": "Trace", "ts": 3, "args": {"name": "python"}},
        event("cudaGraphLaunch", "cuda_runtime", 0, 1000, 1),
        # Two graphs of two kernels each, a copy between them, and kernels that overlap.
        event("b", "kernel", 12, 8, 1),
        event("a", "kernel", 0, 10, 1),
        event("copy", "gpu_memcpy", 25, 5, 2),
        event("a", "kernel", 31, 9, 3),
        event("b", "kernel", 35, 10, 3),
        event("c", "kernel", 36, 2, 3),
        event("set", "gpu_memset", 50, 1, 4),
    ],
}


def test_gaps_are_told_apart_by_launch() -> None:
    activities = read_trace(json.dumps(TRACE).encode())
    assert [activity.name for activity in activities] == ["a", "b", "copy", "a", "b", "c", "set"]
    spent = idle(activities)
    assert spent.window == pytest.approx(51e-6)
    assert spent.within == pytest.approx(2e-6)  # 10 to 12
    assert spent.between == pytest.approx(11e-6)  # 20 to 25, 30 to 31, 45 to 50


def test_what_a_recorder_holds_up_is_left_out() -> None:
    activities = read_trace(json.dumps(TRACE).encode())
    names = [activity.name for activity in settled(activities, 2)]
    assert names == ["a", "b", "c", "set"]
    assert settled(activities, 0) == activities


def test_kernels_are_summed_the_most_first() -> None:
    activities = [
        Activity("x|y", 0.0, 1e-6, 1),
        Activity("z", 2e-6, 8e-6, 1),
        Activity("x|y", 9e-6, 10.6e-6, 2),
        Activity("z", 11e-6, 13e-6, 2),
    ]
    lines = by_kernel(activities).splitlines()
    assert lines[2:] == [
        "| z | x y | 2 | 4.00 | 0.008 | 75.5% |",
        "| x y | z | 1 | 1.60 | 0.002 | 15.1% |",
        "| x y |  | 1 | 1.00 | 0.001 | 9.4% |",
    ]


def test_what_a_kernel_waits_for_is_not_its_own_time() -> None:
    overlapped = [
        Activity("long", 0.0, 10e-6, 1),
        Activity("waits", 2e-6, 13e-6, 1),
        Activity("inside", 3e-6, 5e-6, 1),
    ]
    lines = by_kernel(overlapped).splitlines()
    assert lines[2:] == [
        "| long | inside | 1 | 5.00 | 0.005 | 50.0% |",
        "| waits | long | 1 | 3.00 | 0.003 | 30.0% |",
        "| inside |  | 1 | 2.00 | 0.002 | 20.0% |",
    ]
