"""What OpenMP keeps for who computes only once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from fourfold.kernels.own_thread import on_own_thread

BUILDING = """
import os, time, torch
from fourfold.engine import building
from fourfold.engine.building import EngineSetup

def threads():
    return len(os.listdir("/proc/self/task"))

def build(setup, device, progress, phases):
    torch.rand(600, 600) @ torch.rand(600, 600)
    return threads()

import fourfold.engine.engine
building._build, before = build, threads()
during = building.build_engine(EngineSetup(source=None, device="cpu"), None)
until = time.monotonic() + 20
while threads() > before and time.monotonic() < until:
    time.sleep(0.01)
print(during - before, threads() - before)
"""

LOADING = """
import time
from fourfold.engine import building
from fourfold.engine.building import EngineSetup

def build(setup, device, progress, phases):
    print("loads", flush=True)
    try:
        while True:
            progress(1, 2)
            time.sleep(0.01)
    finally:
        print("ended", flush=True)

building._build = build
building.build_engine(EngineSetup(source=None, device="cpu"), lambda done, total: None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how many threads there are")
def test_nothing_is_kept_of_building_an_engine() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILDING],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    during, after = map(int, done.stdout.split())
    assert during >= 2
    assert after == 0


def test_an_interrupt_ends_what_loads_and_waits_for_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOADING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loads\n"
        process.send_signal(signal.SIGINT)
        told, complaints = process.communicate(timeout=60)
    assert told == "ended\n"
    assert complaints.splitlines()[-1] == "KeyboardInterrupt"


def test_what_is_raised_is_raised_to_who_asked() -> None:
    with pytest.raises(ZeroDivisionError):
        on_own_thread(lambda: 1 // 0)
    assert on_own_thread(lambda: 7) == 7
