"""A run that is asked to end leaves a checkpoint, and goes on as if it had not been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourfold.cli.main import run as command
from fourfold.train import checkpoint
from fourfold.train.config import TrainConfig
from fourfold.train.data.batches import Batch
from fourfold.train.law.grid import Grid
from fourfold.train.law.records import read_records as read_runs
from fourfold.train.loop import Trainer
from fourfold.train.metrics import StepRecord, read_records
from fourfold.train.reporting import Launched
from fourfold.train.stopping import asked_by_signals
from tests.cpu.cli.terminal import MAIN
from tests.cpu.train import toy
from tests.cpu.train.law.test_sweep import BASE, corpus, make

__all__ = ["corpus", "make"]  # fixtures
# A process takes long to start where there is much else to do.
PATIENCE = 280.0
SIGNALS = [signal.SIGTERM, signal.SIGINT]


class Interrupted:
    """Batches of which one brings a signal with it: the step that it is for is under way then."""

    def __init__(self, config: TrainConfig, index: int, number: int) -> None:
        self._chain = toy.chain(config)
        self._index, self._number = index, number

    def batch(self, index: int) -> Batch:
        if index == self._index:
            os.kill(os.getpid(), self._number)
        return self._chain.batch(index)


def train(config: TrainConfig, batches: Any = None) -> bool:
    with asked_by_signals("") as asked:
        return toy.trainer(config, batches).run(held_out=toy.chain(config, seed=1), asked=asked)


def losses_of(folder: Path) -> list[tuple[int, str, float]]:
    """All that was recorded, but times."""
    return [
        (record.step, "loss", record.loss)
        if isinstance(record, StepRecord)
        else (record.step, "held out", record.held_out_loss)
        for record in read_records(folder / "metrics.jsonl")
    ]


def steps_of(folder: Path) -> list[int]:
    """Steps that there are checkpoints of."""
    found = checkpoint.checkpoints(folder / "checkpoints")
    return [int(path.name.removeprefix("step-")) for path in found]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_step_under_way_is_the_last(number: int, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "schedule": {"steps": 12},
        "run": {"save_every": 5, "evaluate_every": 4, "evaluate_batches": 1},
    }
    whole, cut = (toy.config(tmp_path / name, changes) for name in ("whole", "cut"))
    assert not train(whole)
    assert train(cut, Interrupted(cut, 7, number))
    assert steps_of(tmp_path / "cut")[-1] == 8
    told = losses_of(tmp_path / "whole")
    # The evaluation of step 8 is left to the next start.
    until_8 = [each for each in told if each[0] <= 8]
    assert until_8[-1][1] == "held out"
    assert losses_of(tmp_path / "cut") == until_8[:-1]
    assert not train(cut)
    assert losses_of(tmp_path / "cut") == told


def test_the_last_step_may_be_the_one(tmp_path: Path) -> None:
    last: dict[str, Any] = {"schedule": {"steps": 4}, "run": {"evaluate_batches": 1}}
    config = toy.config(tmp_path, last)
    assert train(config, Interrupted(config, 3, signal.SIGTERM))
    assert steps_of(tmp_path) == [4]
    assert not train(config)
    assert [step for step, kind, _ in losses_of(tmp_path) if kind == "held out"] == [4]


def test_the_second_signal_does_what_it_did(capfd: pytest.CaptureFixture[str]) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with asked_by_signals("once") as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
            assert came == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == [signal.SIGTERM]
        with asked_by_signals("never") as asked:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert not asked()
        assert len(came) == 2
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ignored)
    assert capfd.readouterr().err == "once"


@pytest.mark.timeout(300)
def test_the_command_says_where_it_ended(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By SIGINT: what a signal does is the same for both."""
    (tmp_path / "run.toml").write_text(BASE.format(corpus=corpus))
    folder = tmp_path / "run"
    words = ["train", str(tmp_path / "run.toml"), "--set", f"run.folder={folder}"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*MAIN, *words, "schedule.steps=1000000", "run.log_every=1"], stderr=file
        )
    try:
        end = time.monotonic() + PATIENCE
        while b"step 3 " not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    finally:
        process.kill()
    lines = log.read_text().splitlines()
    assert "ending with a checkpoint once the step is done; a second signal ends at once" in lines
    ending = "with a checkpoint; the same command goes on from it"
    found = re.fullmatch(rf"stopped at step ([\d,]+) of 1,000,000, {ending}", lines[-1])
    assert found is not None, lines[-1]
    step = int(found[1].replace(",", ""))
    assert steps_of(folder) == [step]
    assert not (folder / "model").exists()
    assert command([*words, f"schedule.steps={step + 1}"]) == 0
    assert f", from step {step}; " in capsys.readouterr().err
    assert (folder / "model").is_dir()


def test_a_sweep_goes_on_where_a_run_was_stopped(
    make: Callable[..., Grid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("whole")
    make("cut")
    grids = [str(tmp_path / name / "grid.toml") for name in ("whole", "cut")]
    assert command(["law", "sweep", grids[0], "--only", "small-x4"]) == 0
    left = 13
    launch = Trainer.launch

    def stopped(trainer: Trainer, *, asked: bool = False) -> Launched:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return launch(trainer, asked=asked)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "launch", stopped)
        assert command(["law", "sweep", grids[1], "--only", "small-x4"]) == 130
        assert left == 0
        assert command(["law", "sweep", grids[1], "--only", "small-x4"]) == 0
    mine, theirs = (
        {record.name: record.loss for record in read_runs(tmp_path / name / "runs" / "records")}
        for name in ("whole", "cut")
    )
    assert mine == theirs
    assert len(mine) == 2
