"""A run that was interrupted goes on as if it had not been."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.errors import CheckpointError
from fourfold.train import checkpoint
from fourfold.train.config import TrainConfig
from fourfold.train.metrics import Record, StepRecord, read_records
from tests.cpu.train import toy

MUON: dict[str, Any] = {"optimizer": {"kind": "muon"}}
FORMS = {
    "softmax": {},
    "sigmoid": toy.SIGMOID,
    "dense": toy.DENSE,
    "muon": MUON,
    "bfloat16": {"run": {"dtype": "bfloat16", "micro_rows": 4}},
}


class KilledError(Exception):
    """Ends a run from within."""


def losses_of(config: TrainConfig, *, until: int | None = None) -> dict[int, float]:
    losses: dict[int, float] = {}

    def watch(record: Record) -> None:
        assert isinstance(record, StepRecord)
        losses[record.step] = record.loss
        if record.step == until:
            raise KilledError

    with contextlib.suppress(KilledError):
        toy.trainer(config).run(watch=watch)
    return losses


@pytest.mark.parametrize("form", sorted(FORMS))
def test_losses_are_the_same_to_the_last_bit(form: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"schedule": {"steps": 16}, "run": {"save_every": 5}}
    whole = losses_of(toy.config(tmp_path / "whole", FORMS[form], changes))
    config = toy.config(tmp_path / "cut", FORMS[form], changes)
    before = losses_of(config, until=8)
    after = losses_of(config)
    assert list(before) == list(range(1, 9))
    assert list(after) == list(range(6, 17))
    assert before | after == whole
    records = read_records(tmp_path / "cut" / "metrics.jsonl")
    assert [record.step for record in records] == list(range(1, 17))


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"schedule": {"steps": 9}, "run": {"save_every": 2, "keep": 2}}
    config = toy.config(tmp_path, changes)
    toy.trainer(config).run()
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000009"]


def test_a_decay_branches_from_anothers_checkpoint(tmp_path: Path) -> None:
    """The stable phase of a longer run is that of a shorter one, so only the decay is run again."""
    stable = {"schedule": {"decay": 0.25, "warmup": 2}, "run": {"save_every": 6, "keep": 9}}
    long = losses_of(toy.config(tmp_path / "long", stable, {"schedule": {"steps": 16}}))
    short = {"schedule": {"steps": 8}}
    whole = losses_of(toy.config(tmp_path / "whole", stable, short))
    start = tmp_path / "long" / "checkpoints" / "step-00000006"
    branch = {"run": {"start_from": str(start)}}
    branched = losses_of(toy.config(tmp_path / "branch", stable, short, branch))
    assert branched == {step: whole[step] for step in (7, 8)}
    assert {step: long[step] for step in range(1, 8)} == {s: whole[s] for s in range(1, 8)}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    toy.trainer(toy.config(tmp_path, {"schedule": {"steps": 2, "warmup": 0}})).run()
    for other in (toy.DENSE, toy.SIGMOID, {"model": {"width": 64}}, MUON):
        with pytest.raises(CheckpointError, match="step-00000002"):
            toy.trainer(toy.config(tmp_path, other))


_SAVING = """
import sys
from pathlib import Path
from tests.cpu.train import toy
config = toy.config(Path(sys.argv[1]), {"run": {"save_every": 1}, "schedule": {"steps": 100000}})
print("saving", flush=True)
toy.trainer(config).run()
"""


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The process is killed as soon as a checkpoint is being written."""
    run = [sys.executable, "-c", _SAVING, str(tmp_path)]
    folder = tmp_path / "checkpoints"
    with subprocess.Popen(run, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 100
        try:
            while len(checkpoint.checkpoints(folder)) < 2 or not list(folder.glob(".unf*")):
                assert time.monotonic() < deadline
                assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
    kept = checkpoint.checkpoints(folder)
    config = toy.config(tmp_path, {"schedule": {"steps": 100_000}})
    trainer = toy.trainer(config)
    assert trainer.steps == int(kept[-1].name.removeprefix("step-"))
    fresh = tmp_path / "fresh"
    changes: dict[str, Any] = {"schedule": {"steps": 100_000}, "run": {"save_every": 1}}
    again = toy.trainer(toy.config(fresh, changes))
    for _ in range(trainer.steps):
        again.launch()
    for mine, theirs in zip(trainer.optimizer.state(), again.optimizer.state(), strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1]), mine[0]
    trainer.save()
    assert not list(folder.glob(".unf*"))
    shutil.rmtree(tmp_path)
