"""A run that was interrupted goes on as if it had not been."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fourfold.errors import CheckpointError, ConfigError
from fourfold.train import checkpoint
from fourfold.train.config import TrainConfig
from fourfold.train.metrics import EvaluationRecord, Record, StepRecord, read_records
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
    shallow = {"model": {"layers": 1}}
    for other in (toy.DENSE, toy.SIGMOID, {"model": {"width": 64}}, MUON, shallow):
        with pytest.raises(CheckpointError, match=r"step-00000002 is of another model"):
            toy.trainer(toy.config(tmp_path, other))


def test_a_checkpoint_is_named_where_a_run_was(tmp_path: Path) -> None:
    last = {"schedule": {"steps": 2, "warmup": 0}}
    toy.trainer(toy.config(tmp_path / "run", last)).run()
    branch = {"run": {"start_from": str(tmp_path / "run")}}
    with pytest.raises(CheckpointError, match=r"; name .*run/checkpoints/step-00000002$"):
        toy.trainer(toy.config(tmp_path / "branch", last, branch))


def test_a_damaged_checkpoint_may_be_deleted(tmp_path: Path) -> None:
    config = toy.config(tmp_path, {"schedule": {"steps": 4, "warmup": 0}, "run": {"save_every": 2}})
    toy.trainer(config).run()
    older, newest = checkpoint.checkpoints(tmp_path / "checkpoints")
    os.truncate(newest / "state.safetensors", 1000)
    with pytest.raises(
        CheckpointError, match=f"{newest} is no .*; delete it to go on from {older}"
    ):
        toy.trainer(config)
    shutil.rmtree(newest)
    assert toy.trainer(config).steps == 2


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        ("model", "experts_per_token", 1, "experts_per_token = 1, not 2"),
        ("model", "rope_theta", 500.0, r"theta = 500\.0, not 10000\.0"),
        ("router", "gate_scale", 2.0, r"scale = 2\.0, not 1\.0"),
    ],
)
def test_a_model_that_differs_in_no_tensor_is_refused(
    section: str, name: str, value: float, said: str, tmp_path: Path
) -> None:
    last = {"schedule": {"steps": 2, "warmup": 0}}
    toy.trainer(toy.config(tmp_path / "run", last)).run()
    start = tmp_path / "run" / "checkpoints" / "step-00000002"
    changed = {section: {name: value}}
    for elsewhere in ({}, {"run": {"folder": str(tmp_path), "start_from": str(start)}}):
        with pytest.raises(CheckpointError, match=f"step-00000002 is of another model.*{said}"):
            toy.trainer(toy.config(tmp_path / "run", last, changed, elsewhere))


@pytest.mark.parametrize(("name", "value"), [("rows", 4), ("length", 12), ("seed", 1)])
def test_a_place_in_other_batches_is_refused(name: str, value: int, tmp_path: Path) -> None:
    toy.trainer(toy.config(tmp_path, {"schedule": {"steps": 2, "warmup": 0}})).run()
    with pytest.raises(ConfigError, match=rf"data\.{name} = {value}"):
        toy.trainer(toy.config(tmp_path, {"data": {name: value}}))


def test_fewer_steps_than_were_taken_are_refused(tmp_path: Path) -> None:
    toy.trainer(toy.config(tmp_path, {"schedule": {"steps": 4}})).run()
    with pytest.raises(ConfigError, match=r"schedule\.steps = 3, but .*step-00000004 has taken 4"):
        toy.trainer(toy.config(tmp_path, {"schedule": {"steps": 3}}))


def test_a_run_that_is_at_its_end_is_evaluated_once(tmp_path: Path) -> None:
    """It starts from where a stable phase ended and has no decay, or its metrics were lost."""
    last = {"schedule": {"steps": 4, "decay": 0.0}, "run": {"evaluate_batches": 1}}
    stable = toy.config(tmp_path / "stable", last)
    unseen = toy.chain(stable, seed=1)
    toy.trainer(stable).run(held_out=unseen)
    start = tmp_path / "stable" / "checkpoints" / "step-00000004"
    branch = toy.config(tmp_path / "branch", last, {"run": {"start_from": str(start)}})
    for _ in range(2):
        toy.trainer(branch).run(held_out=unseen)
    found = [read_records(tmp_path / run / "metrics.jsonl") for run in ("stable", "branch")]
    assert found[1] == [record for record in found[0] if isinstance(record, EvaluationRecord)]
    assert len(found[1]) == 1


def half_a_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes as `save_file` does, and is killed before it is done."""
    save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("where", "instead", "left"),
    [
        ("fourfold.train.checkpoint.save_file", half_a_file, [1, 2]),
        ("fourfold.train.checkpoint.flush", die, [1, 2]),
        ("pathlib.Path.rename", die, [1, 2]),
        ("fourfold.train.checkpoint._remove", die, [1, 2, 3]),
        ("shutil.rmtree", die, [2, 3]),
    ],
)
def test_a_kill_at_any_point_of_saving_leaves_whole_checkpoints(
    where: str, instead: Any, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"run": {"save_every": 1, "keep": 2}}
    first = toy.config(tmp_path, changes, {"schedule": {"steps": 2, "decay": 0.0}})
    trainer = toy.trainer(first)
    trainer.run()
    trainer.launch()
    with monkeypatch.context() as patch:
        patch.setattr(where, instead)
        child = os.fork()
        if child == 0:  # it saves, is killed while it does, and never gets further
            trainer.save()
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    folder = tmp_path / "checkpoints"
    found = checkpoint.checkpoints(folder)
    assert [int(path.name.removeprefix("step-")) for path in found] == left
    for path in found:
        fresh = toy.trainer(toy.config(tmp_path / "fresh", {"run": {"start_from": str(path)}}))
        assert fresh.steps == int(path.name.removeprefix("step-"))
    if left[-1] == 3:
        for mine, theirs in zip(trainer.optimizer.state(), fresh.optimizer.state(), strict=True):
            assert torch.equal(mine[1], theirs[1]), mine[0]
    trainer.save()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
