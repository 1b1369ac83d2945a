"""Compiled layers compute what they compute otherwise, however many there are."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fourfold.train.metrics import EvaluationRecord, Record
from tests.cpu.train import toy

FORMS: dict[str, dict[str, Any]] = {"softmax": {}, "sigmoid": toy.SIGMOID, "dense": toy.DENSE}


def run(folder: Path, form: str, compiled: bool) -> list[float]:
    """Losses of two steps with an evaluation after each, by eleven layers."""
    changes: dict[str, Any] = {
        "model": {"layers": 11},
        "schedule": {"steps": 2, "warmup": 1},
        "run": {"compile": compiled, "micro_rows": 4, "evaluate_every": 1, "evaluate_batches": 1},
    }
    config = toy.config(folder, FORMS[form], changes)
    records: list[Record] = []
    toy.trainer(config).run(held_out=toy.chain(config, seed=1), watch=records.append)
    return [
        record.held_out_loss if isinstance(record, EvaluationRecord) else record.loss
        for record in records
    ]


@pytest.mark.parametrize("form", sorted(FORMS))
def test_all_layers_are_compiled(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one code: torch gives up, and computes the rest uncompiled, after eight."""
    # What is traced is run as it is: making code of it takes long, and is torch's affair.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = run(tmp_path / "compiled", form, True)
    torch.compiler.reset()
    assert compiled == pytest.approx(run(tmp_path / "plain", form, False), rel=1e-5)
