"""What a run tells: spikes, dead experts, numbers that are none, TensorBoard."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import UNSET

from fourfold.errors import ConfigError
from fourfold.train import reporting
from fourfold.train.metrics import Metrics, Record, SpikeWatch, StepRecord, loads, read_records
from fourfold.train.reporting import Launched, Moment, Reporter, TrainingError
from tests.cpu.instead import Instead
from tests.cpu.train import toy


def losses_of_a_usual_run() -> list[float]:
    noise = np.random.default_rng(0).normal(0, 0.02, 600)
    return [2 + 4 * 0.97**step + float(noise[step]) for step in range(600)]


def test_a_usual_run_has_no_spike() -> None:
    watch = SpikeWatch()
    assert not any(watch.see(loss) for loss in losses_of_a_usual_run())


def test_a_jump_is_a_spike_and_its_return_is_none() -> None:
    watch = SpikeWatch()
    usual = losses_of_a_usual_run()
    for loss in usual[:400]:
        watch.see(loss)
    assert watch.see(3.0)
    assert watch.see(2.8)
    assert not watch.see(usual[401])


def test_dead_experts_are_counted() -> None:
    assert loads(torch.tensor([[5.0, 5, 5, 5], [20, 0, 0, 0.05]])) == (
        pytest.approx(3.99, abs=0.01),
        0.0,
        3 - 1 + 1,
    )


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    trainer = toy.trainer(toy.config(tmp_path))
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="step 1 is nan"):
        trainer.run()
    assert not (tmp_path / "checkpoints").exists()


class At(Moment):
    """A moment of a device's own time, at which numbers arrive."""

    def __init__(self, seconds: float, arrive: Callable[[], object] = lambda: None) -> None:
        super().__init__(torch.device("cpu"))
        self._at, self.wait = seconds, arrive  # type: ignore[assignment, method-assign]


def reporter_of(records: list[Record], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Reporter:
    """One whose clock starts at 0, on a device that does 1000 FLOP/s at most."""
    monkeypatch.setattr(reporting, "time", Instead(time, perf_counter=lambda: 0.0))
    log = Metrics(Path("unused"), steps=0, tensorboard=False)
    return Reporter(
        log,
        records.append,
        device=torch.device("cpu"),
        flops_per_token=5,
        peak=1000,
        spikes=SpikeWatch(),
        **options,
    )


def test_a_step_is_read_when_its_numbers_are_there() -> None:
    """And not when the device has done what it was given since."""
    sums_5 = torch.zeros(5)
    cpu = torch.device("cpu")
    reporter = Reporter(
        None, print, device=cpu, every=1, last=1, flops_per_token=1, peak=None, spikes=SpikeWatch()
    )
    there = At(1.0, lambda: sums_5.copy_(torch.tensor([6.0, 0, 0, 1, 0])))
    reporter.read(Launched(1, 3, 3, 0.1, sums_5, None, there))
    assert reporter.spikes.mean == 2.0


def test_speeds_are_those_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one second each, however long the host takes to read them: the last is read right
    after the one before it."""
    monkeypatch.chdir(tmp_path)
    records: list[Record] = []
    reporter = reporter_of(records, monkeypatch, every=2, last=5)
    steps = [Launched(n, 100, 100 * n, 0.1, torch.ones(5), None, At(float(n))) for n in range(1, 6)]
    for step in steps:
        reporter.read(step)
    told = [(r.step, r.tokens_per_second, r.mfu) for r in records if isinstance(r, StepRecord)]
    assert told == [(2, 100.0, 0.5), (4, 100.0, 0.5), (5, 100.0, 0.5)]
    assert reporter.seconds == 5.0


def test_moments_of_a_gpu_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        """The device comes to it 250 ms after the one before."""

        count = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.count += 1
            self.at = 250.0 * Event.count

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    first, _, third = (Moment(torch.device("cuda")) for _ in range(3))
    assert third.seconds_since(first) == 0.5


def test_what_is_no_training_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    records: list[Record] = []
    reporter = reporter_of(records, monkeypatch, every=1, last=2)
    reporter.read(Launched(1, 100, 100, 0.1, torch.ones(5), None, At(1.0)))
    monkeypatch.setattr(reporting, "time", Instead(time, perf_counter=lambda: 60.0))
    reporter.begin()
    reporter.read(Launched(2, 100, 200, 0.1, torch.ones(5), None, At(61.0)))
    assert [r.tokens_per_second for r in records if isinstance(r, StepRecord)] == [100.0, 100.0]
    assert reporter.seconds == 2.0


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    toy.trainer(toy.config(tmp_path, {"schedule": {"steps": 3}})).run()
    whole = read_records(path)
    assert [record.step for record in whole] == [1, 2, 3]
    path.write_bytes(path.read_bytes()[:-10])
    assert read_records(path) == whole[:2]


def test_tensorboard_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fourfold\[tensorboard\]'"):
        toy.config(tmp_path, {"run": {"tensorboard": True}})


def test_tensorboard_gets_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[float, int]] = {}

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert purge_step == 5

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen[name] = (value, step)

        def close(self) -> None:
            seen["closed"] = (0, 0)

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metrics = Metrics(tmp_path, steps=4, tensorboard=True)
    metrics.write(
        StepRecord(step=5, tokens=9, loss=2.5, gradient_norm=1, rate=0.1, tokens_per_second=7)
    )
    metrics.close()
    assert seen["loss"] == (2.5, 5)
    assert seen["tokens_per_second"] == (7, 5)
    assert "mfu" not in seen
    assert "closed" in seen


def test_experts_are_judged_once_enough_rows_were_routed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 rows for each of 4 experts: what two steps of 48 rows tell together."""
    monkeypatch.chdir(tmp_path)
    records: list[Record] = []
    reporter = reporter_of(records, monkeypatch, every=1, last=4)
    for step, load_E in enumerate(([24, 24, 0, 0], [0, 24, 24, 0], [9, 9, 9, 9]), start=1):
        load_LE = torch.tensor([load_E], dtype=torch.float32)
        launched = Launched(step, 9, 9, 0.1, torch.ones(5), load_LE, At(float(step)))
        reporter.read(launched)
    found = [
        (r.load_most, r.load_least, r.dead_experts) for r in records if isinstance(r, StepRecord)
    ]
    none = (UNSET, UNSET, UNSET)
    assert found == [none, (2.0, 0.0, 1), none]
    assert all(isinstance(r, StepRecord) and r.balance == 1 for r in records)
