"""Training on a GPU: kernels against their references, steps against those of a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.cli.main import run as command
from fourfold.kernels import training
from fourfold.kernels.grouped_gemm import grouped_gemm
from fourfold.kernels.training import reference
from fourfold.train.config import TrainConfig
from fourfold.train.data.batches import Batch
from fourfold.train.data.grammar import Grammar, write_grammar
from fourfold.train.data.grammar_config import GrammarConfig
from fourfold.train.law.records import read_records as read_law
from fourfold.train.metrics import EvaluationRecord, Record, StepRecord, read_records
from fourfold.train.parallel import Parallel
from fourfold.train.step import Documents, TrainStep, _by_rows, _varlen, lay_out
from tests.cpu.train import ranks, toy
from tests.cpu.train.law.test_sweep import BASE

GRID = """
base = "base.toml"
out = "law"
tokens = [4000, 8000]
ratios = [1, 4]
sparse = { "router.z_loss" = 1e-3 }
[[model]]
name = "small"
set = { "model.width" = 64, "model.head_width" = 32, "model.expert_width" = 32 }
"""
GPU = Parallel(0, 1, torch.device("cuda", 0))
FORMS: dict[str, dict[str, Any]] = {"softmax": {}, "sigmoid": toy.SIGMOID, "dense": toy.DENSE}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def close(got: Tensor | None, wanted: Tensor | None, rounds: float = 2**-7) -> None:
    if got is None or wanted is None:
        assert got is wanted
        return
    assert got.dtype == wanted.dtype
    difference = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-9)
    assert difference < rounds


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (1000, 768), (77, 5464)])
def test_swiglu(rows: int, width: int, gated: bool) -> None:
    gate_up, upstream = random(rows, 2 * width), random(rows, width)
    gates = torch.rand(rows, device="cuda") if gated else None
    close(training.gated_swiglu(gate_up, gates), reference.gated_swiglu(gate_up, gates))
    got = training.gated_swiglu_backward(upstream, gate_up, gates)
    again = training.gated_swiglu_backward(upstream, gate_up, gates)
    wanted = reference.gated_swiglu_backward(upstream, gate_up, gates)
    for mine, twice, theirs in zip(got, again, wanted, strict=True):
        close(mine, theirs)
        assert mine is twice or torch.equal(mine, twice)


@pytest.mark.parametrize(
    ("tokens", "choices", "width"), [(1, 1, 64), (70, 1, 512), (500, 8, 2048), (9, 4, 72)]
)
def test_rows_are_added_up(tokens: int, choices: int, width: int) -> None:
    rows = random(tokens * choices, width)
    places = torch.randperm(tokens * choices, device="cuda").view(tokens, choices)
    close(training.sum_rows(rows, places), reference.sum_rows(rows, places))


@pytest.mark.parametrize("vocabulary", [64, 5003, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cross_entropy(vocabulary: int, dtype: torch.dtype) -> None:
    logits = random(33, vocabulary, dtype=dtype) * 4
    target = torch.randint(vocabulary, (33,), device="cuda")
    target[::5] = -1
    mine, theirs = logits.clone(), logits.clone()
    loss = training.cross_entropy(mine, target, gradient=True)
    close(loss, reference.cross_entropy(theirs, target, gradient=True), 1e-4)
    close(mine, theirs)
    assert torch.equal(loss, training.cross_entropy(logits, target, gradient=False))


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"),
    [(1, 2, 1, 16), (3000, 32, 4, 128), (1025, 9, 3, 64), (130, 64, 8, 64)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_gradients_through_norm_and_rotation(
    tokens: int, heads: int, kv_heads: int, width: int, normed: bool
) -> None:
    qkv = random(tokens, (heads + 2 * kv_heads) * width)
    angle = torch.rand(tokens, width // 2, device="cuda") * 6
    cos = torch.cat((angle.cos(), angle.cos()), -1).bfloat16()
    sin = torch.cat((-angle.sin(), angle.sin()), -1).bfloat16()
    weights = [(torch.rand(width, device="cuda") + 0.5).bfloat16() if normed else None] * 2
    upstream = tuple(random(tokens, count, width) for count in (heads, kv_heads, kv_heads))
    got = training.norm_rope_backward(upstream, qkv, cos, sin, *weights)
    wanted = reference.norm_rope_backward(upstream, qkv, cos, sin, *weights)
    for mine, theirs in zip(got, wanted, strict=True):
        close(mine, theirs)


def test_an_expert_without_rows_has_no_gradient() -> None:
    """Rows do not come in multiples of anything."""
    ends = torch.tensor([13, 13, 50, 50, 61], dtype=torch.int32, device="cuda")
    rows, weight = random(61, 64).requires_grad_(), random(5, 32, 64).requires_grad_()
    out, upstream = grouped_gemm(rows, weight, ends), random(61, 32)
    torch.full((64 << 20,), 0x7F, dtype=torch.uint8, device="cuda")
    got = torch.autograd.grad(out, (rows, weight), upstream)
    starts = [0, *ends.tolist()[:-1]]
    for expert, (start, end) in enumerate(zip(starts, ends.tolist(), strict=True)):
        mine, given = rows[start:end].double(), upstream[start:end].double()
        close(out[start:end].double(), mine @ weight[expert].double().T, 0.01)
        close(got[0][start:end].double(), given @ weight[expert].double(), 0.01)
        close(got[1][expert].double(), given.T @ mine, 0.01)
    assert not got[1][1].any()
    assert not got[1][3].any()


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 128), (4, 4, 64), (6, 3, 32)])
def test_rows_of_one_document_need_no_beginnings(heads: int, kv_heads: int, width: int) -> None:
    rows, length = 3, 200
    positions = torch.arange(length, device="cuda").repeat(rows)
    documents = Documents(rows, length, positions)
    starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device="cuda")
    given = [random(rows * length, n, width).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    upstream = random(rows * length, heads, width)
    q, k, v = given
    outs = [_by_rows(q, k, v, documents), _varlen(q, k, v, starts, length)]
    close(*outs)
    for mine, theirs in zip(
        *(torch.autograd.grad(out, given, upstream) for out in outs), strict=True
    ):
        close(mine, theirs)


def test_gradients_are_accumulated_in_float32() -> None:
    total, grad = random(3, 5000), random(3, 5000)
    wanted = total.float() + grad.float()
    got = training.accumulate(total, grad)
    assert torch.equal(got, wanted)
    assert training.accumulate(got, grad) is got
    assert torch.equal(got, wanted + grad.float())


@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_step_is_that_of_a_cpu(form: str, tmp_path: Path) -> None:
    """Loss, and every gradient up to what bfloat16 rounds, from the same weights; chosen experts
    may differ where two are as good."""
    changes: dict[str, Any] = {"data": {"length": 100, "rows": 6}}
    grads: list[dict[str, Tensor]] = []
    losses: list[float] = []
    for parallel in (toy.ALONE, GPU):
        config = toy.config(tmp_path, FORMS[form], changes)
        trainer = toy.trainer(config, parallel=parallel)
        documents, tokens_T, target_T = lay_out(toy.chain(config).batch(0), parallel.device)
        out = trainer._objective(trainer.model, TrainStep(documents), tokens_T, target_T, toy.WHOLE)
        out.total.backward()
        losses.append(float(out.cross_entropy))
        named = trainer.model.named_parameters()
        grads.append({n: p.grad.cpu().float() for n, p in named if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        likeness = torch.cosine_similarity(grads[1][name].flatten(), wanted.flatten(), dim=0)
        assert likeness > 0.97, name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_learns_as_on_a_cpu(kind: str, compiled: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"schedule": {"steps": 150}, "optimizer": {"kind": kind}}
    config = toy.config(
        tmp_path, toy.SIGMOID, changes, {"run": {"compile": compiled, "micro_rows": 4}}
    )
    records: list[Record] = []
    unseen = toy.chain(config, seed=1)
    trainer = toy.trainer(config, parallel=GPU)
    trainer.run(held_out=unseen, watch=records.append)
    [evaluation] = [record for record in records if isinstance(record, EvaluationRecord)]
    assert evaluation.held_out_loss < unseen.best_loss(16) + 0.15
    continued = toy.trainer(config, parallel=GPU)
    assert continued.evaluate(unseen).held_out_loss == pytest.approx(
        evaluation.held_out_loss, abs=2e-3
    )


class Growing:
    """Rows of one document at first, of more and more later."""

    def __init__(self, config: TrainConfig) -> None:
        self._chain = toy.chain(config)

    def batch(self, index: int) -> Batch:
        batch = self._chain.batch(index)
        length = batch.tokens.shape[1]
        place_L = torch.arange(length, dtype=torch.int32)
        size = length if index < 4 else 30 - 3 * index
        return Batch(batch.tokens, (place_L // size).expand_as(batch.document))


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_captured_step_is_that_step(kind: str, form: str, tmp_path: Path) -> None:
    """Losses, norms, loads and weights, with documents that outgrow the first graph's room."""
    losses: list[list[float]] = []
    weights: list[dict[str, Tensor]] = []
    for captured in (False, True):
        changes: dict[str, Any] = {
            "optimizer": {"kind": kind},
            "schedule": {"steps": 8},
            "run": {"cuda_graph": captured, "micro_rows": 4},
        }
        config = toy.config(tmp_path / str(captured), FORMS[form], changes)
        trainer = toy.trainer(config, parallel=GPU, batches=Growing(config))
        records: list[Record] = []
        trainer.run(watch=records.append)
        steps = [record for record in records if isinstance(record, StepRecord)]
        losses.append([x for s in steps for x in (s.loss, s.gradient_norm)])
        weights.append(dict(trainer.optimizer.weights()))
    assert len(losses[0]) == 16
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    for name, weight in weights[0].items():
        close(weights[1][name], weight, 0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_take_the_steps_of_one(tmp_path: Path) -> None:
    together = ranks.run_two(tmp_path / "together", "cuda")
    for case in ranks.CASES:
        config = ranks.config_of(case, tmp_path / "alone", {"parallel": {"experts": 1}})
        toy.trainer(config, parallel=GPU).run()
        theirs = Path(ranks.config_of(case, together).run.folder)
        pairs = [
            [
                record.loss
                for record in read_records(folder / "metrics.jsonl")
                if isinstance(record, StepRecord)
            ]
            for folder in (Path(config.run.folder), theirs)
        ]
        assert pairs[1] == pytest.approx(pairs[0], rel=0.02), case


def test_a_sweep_trains_on_every_gpu(tmp_path: Path) -> None:
    """In this process where there is one, else by a worker for each."""
    grammar = Grammar(GrammarConfig(levels=2, symbols=4, rules=2, words=4))
    for stream, split in enumerate(("train", "held-out")):
        write_grammar(grammar, tmp_path / split, split, stream, 9000)
    base = BASE.format(corpus=tmp_path).replace('device = "cpu"', 'device = "cuda"')
    (tmp_path / "base.toml").write_text(base)
    (tmp_path / "grid.toml").write_text(GRID)
    assert command(["law", "sweep", str(tmp_path / "grid.toml")]) == 0
    records = read_law(tmp_path / "law/records")
    assert len(records) == 4
    assert {record.hardware for record in records} == {torch.cuda.get_device_name()}
    assert all(0 < record.loss < 4 for record in records)
    logs = sorted((tmp_path / "law/logs").glob("*"))
    # There are two chains.
    assert len(logs) == (0 if torch.cuda.device_count() == 1 else 2)
    for log in logs:
        assert "held-out loss" in log.read_text()
