"""What a worker does in place of training. Loads without torch, so that its process starts fast."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from fourfold.train.law.grid import Run, RunFailedError
from fourfold.train.metrics import EvaluationRecord, StepRecord

# A process takes long to start where there is much else to do.
PATIENCE = 280.0


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def leave(run: Run) -> None:
    """What `fourfold train` leaves of a run."""
    run.checkpoint.mkdir(parents=True)
    steps = run.config.schedule.steps
    loss = 3.0 + 1 / steps
    lines = [
        StepRecord(
            step=step,
            tokens=step * 30,
            loss=loss,
            gradient_norm=1.0,
            rate=1e-3,
            tokens_per_second=100.0 * step,
        )
        for step in (1, 2, 3)
    ]
    last = EvaluationRecord(step=steps, tokens=steps * 30, held_out_loss=loss, evaluated_tokens=9)
    text = b"".join(msgspec.json.encode(line) + b"\n" for line in [*lines, last])
    (run.folder / "metrics.jsonl").write_bytes(text)


def some_fail(base: Path, run: Run) -> None:
    """One takes its process with it once, one always fails."""
    print("training", run.name, os.environ["NUMBER"], flush=True)
    if run.name == "wide-x4-320-s0" and not (base.parent / "died").exists():
        (base.parent / "died").touch()
        os._exit(7)
    if run.name == "small-x4-320-s0":
        raise RunFailedError("it fell over")
    leave(run)


def together(base: Path, run: Run) -> None:
    """Does not end before another worker has begun."""
    (base.parent / f"begun-{os.environ['NUMBER']}").touch()
    wait_for(lambda: len(list(base.parent.glob("begun-*"))) == 2)
    leave(run)


def endless(base: Path, run: Run) -> None:
    (base.parent / f"endless-{os.getpid()}").touch()
    time.sleep(3600)
