"""Runs learn what there is to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.train.metrics import EvaluationRecord, Record, StepRecord
from tests.cpu.train import toy

MUON: dict[str, Any] = {"optimizer": {"kind": "muon"}}
FORMS = {"softmax": {}, "sigmoid": toy.SIGMOID, "dense": toy.DENSE, "muon": MUON}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_one_batch_is_learnt_by_heart(form: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data": {"rows": 2}, "schedule": {"steps": 70}}
    config = toy.config(tmp_path, FORMS[form], changes, {"run": {"save_every": 1000}})
    records: list[Record] = []
    batch = toy.Same(toy.chain(config).batch(0))
    toy.trainer(config, batch).run(watch=records.append)
    losses = [record.loss for record in records if isinstance(record, StepRecord)]
    assert losses[0] > 2.5
    assert losses[-1] < 0.3


def test_a_source_is_learnt_to_its_entropy(tmp_path: Path) -> None:
    """Knowing the chain gives the least loss there is; 200 steps come within 0.08 nats of it."""
    changes: dict[str, Any] = {"data": {"rows": 12}, "schedule": {"steps": 200}}
    run = {"run": {"save_every": 1000, "evaluate_every": 1000, "evaluate_batches": 8}}
    config = toy.config(tmp_path, changes, run)
    records: list[Record] = []
    unseen = toy.chain(config, seed=1)
    toy.trainer(config).run(held_out=unseen, watch=records.append)
    [evaluation] = [record for record in records if isinstance(record, EvaluationRecord)]
    best = unseen.best_loss(8)
    assert best < evaluation.held_out_loss < best + 0.08
