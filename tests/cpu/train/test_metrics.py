"""What a run tells: spikes, dead experts, numbers that are none, TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from fourfold.errors import ConfigError
from fourfold.train.metrics import Metrics, SpikeWatch, StepRecord, loads, read_records
from fourfold.train.reporting import Launched, Reporter, TrainingError
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


def test_a_step_is_read_when_its_numbers_are_there() -> None:
    """And not when the device has done what it was given since."""
    sums_4 = torch.zeros(4)

    class Copied:
        def synchronize(self) -> None:
            sums_4.copy_(torch.tensor([6.0, 0, 0, 1]))

    reporter = Reporter(
        None, print, every=1, last=1, flops_per_token=1, peak=None, spikes=SpikeWatch()
    )
    step = Launched(1, 3, 3, 0.1, sums_4, None, cast(torch.cuda.Event, Copied()))
    reporter.read(step)
    assert reporter.spikes.mean == 2.0


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
    with pytest.raises(ConfigError, match="pip install tensorboard"):
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
