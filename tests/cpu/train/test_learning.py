"""Runs learn what there is to learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fourfold.cli.main import run
from fourfold.train.data.grammar import Grammar
from fourfold.train.data.grammar_config import GrammarConfig
from fourfold.train.metrics import EvaluationRecord, Record, StepRecord, read_records
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


GRAMMAR = GrammarConfig(levels=2, symbols=4, rules=2, words=3, topics=1, sentences=40)
CORPUS = """
[model]
layers = 2
width = 48
heads = 2
kv_heads = 1
head_width = 16
experts = 4
experts_per_token = 2
expert_width = 32

[data]
train = "{folder}/train"
held_out = "{folder}/held-out"
length = 128
rows = 8

[optimizer]
kind = "muon"
rate = 2e-2

[schedule]
steps = 120
warmup = 10
decay = 0.5

[run]
folder = "{folder}/run"
device = "cpu"
export = false
"""


def test_the_procedural_corpus_is_learnt_to_its_entropy(tmp_path: Path) -> None:
    """1.44 nats a token, exactly, for its documents have one topic. Whoever sees one token before
    each loses 2.08 nats, and who sees three 1.49."""
    sizes = [
        word
        for name, value in dataclasses.asdict(GRAMMAR).items()
        for word in (f"--{name}", str(value))
    ]
    tokens = ["--tokens", "120000", "--held-out-tokens", "20000"]
    assert run(["corpus", "grammar", "--out", str(tmp_path), *tokens, *sizes]) == 0
    (tmp_path / "run.toml").write_text(CORPUS.format(folder=tmp_path))
    assert run(["train", str(tmp_path / "run.toml")]) == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    [evaluation] = [record for record in records if isinstance(record, EvaluationRecord)]
    least, most = Grammar(GRAMMAR).entropy
    assert least == most == pytest.approx(1.4425, abs=1e-4)
    # Held-out text is a sample: its own entropy is 0.01 off. Rows that begin within a sentence and
    # what is not learnt yet cost 0.03.
    assert least - 0.03 < evaluation.held_out_loss < most + 0.06
