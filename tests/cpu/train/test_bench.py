"""The benchmark's peers take the same steps: same loss and same gradients from the same weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import UNSET

import fourfold.bench.train.main as bench
from fourfold.bench.record import load
from fourfold.bench.train.config import TrainBenchConfig
from fourfold.bench.train.engines import Engine, Ours, Theirs, make_peer
from fourfold.bench.train.plain import PlainDecoder
from fourfold.errors import ConfigError
from fourfold.train.config import TrainConfig
from fourfold.train.losses import Scale
from fourfold.train.step import TrainStep, lay_out
from tests.cpu.train import toy

CPU = torch.device("cpu")
# What is compared has no balance loss, which peers lack.
PLAIN: dict[str, Any] = {"router": {"balance_loss": 0.0}, "model": {"max_positions": 64}}
FILE = """
[model]
layers = 1
width = 16
heads = 2
kv_heads = 1
head_width = 8
experts = 4
experts_per_token = 2
expert_width = 8
[data]
train = "none"
rows = 2
length = 8
[schedule]
steps = 1
warmup = 0
[run]
folder = "none"
device = "cpu"
"""


def named(name: str) -> str:
    """What the plain decoder calls a parameter of ours."""
    name = (
        name.replace("layers.", "blocks.")
        .replace(".experts.", ".")
        .replace("head.weight.", "head.")
    )
    return (
        name.replace(".weight.weight", ".weight")
        .replace("gate_up.weight", "gate_up@")
        .replace("down.weight", "down@")
    )


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_plain_pytorch_computes_our_loss_and_gradients(form: str, tmp_path: Path) -> None:
    config = toy.config(tmp_path, PLAIN, {"model": {"form": form}})
    model = toy.decoder_config(config)
    ours = Ours(config, model, CPU)
    theirs = make_peer("plain", config, model, CPU)
    assert isinstance(theirs, Theirs)
    assert isinstance(theirs.model, PlainDecoder)
    sparse = form == "sparse"
    plain = dict(theirs.model.named_parameters())
    pairs = []
    for name, parameter in ours.trainer.model.named_parameters():
        other = named(name).replace("@", "" if sparse else ".weight")
        pairs.append((parameter, plain.pop(other)))
    assert not plain
    with torch.no_grad():
        for parameter, other in pairs:
            other.copy_(parameter)
    batch = ours.trainer._batches.batch(0)
    loss = theirs.loss(batch.tokens)
    loss.backward()
    documents, tokens_T, target_T = lay_out(batch, CPU)
    share = Scale(1 / len(target_T), 1.0)
    losses = ours.trainer._objective(
        ours.trainer.model, TrainStep(documents), tokens_T, target_T, share
    )
    losses.total.backward()
    assert float(losses.total.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for parameter, other in pairs:
        assert parameter.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_a_record_of_both_forms(tmp_path: Path) -> None:
    file, out = tmp_path / "run.toml", tmp_path / "train.json"
    file.write_text(FILE)
    options = TrainBenchConfig(
        config=file,
        set=("model.vocabulary=48",),
        peers=("plain",),
        warmup=1,
        steps=1,
        rounds=2,
        vocabulary=64,
        out=out,
    )
    assert bench.main(options) == 0
    results = load(out).results
    assert [result.metric for result in results] == ["tokens_per_second"] * 2
    assert {result.case.split(",")[0] for result in results} == {"sparse", "dense"}
    assert all(result.peer == "plain" and result.value > 0 for result in results)


def test_a_peer_that_does_not_fit_takes_smaller_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(peer: Any, config: TrainConfig, *others: Any) -> Engine:
        if peer == "compiled" or config.run.micro_rows != 1:
            raise torch.OutOfMemoryError
        return make_peer("plain", config, *others)

    monkeypatch.setattr(bench, "make_peer", make)
    (tmp_path / "run.toml").write_text(FILE)
    options = TrainBenchConfig(
        config=tmp_path / "run.toml",
        forms=("dense",),
        peers=("compiled", "plain"),
        warmup=0,
        steps=1,
        rounds=1,
        out=tmp_path / "train.json",
    )
    assert bench.main(options) == 0
    results = load(tmp_path / "train.json").results
    assert [result.peer for result in results] == ["plain, micro-batches of 1"]
    assert "compiled is left out: it does not fit" in capsys.readouterr().err


def test_a_family_without_peers_is_refused(tmp_path: Path) -> None:
    config = toy.config(tmp_path, toy.SIGMOID)
    with pytest.raises(ConfigError, match=r"router\.score"):
        make_peer("plain", config, toy.decoder_config(config), CPU)


def test_a_compiled_peer_takes_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense one: torch traces grouped products of bfloat16 only, which a GPU has."""
    # Making code of what is traced takes long, and is torch's affair.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = toy.config(tmp_path, PLAIN, toy.DENSE)
    peer = make_peer("compiled", config, toy.decoder_config(config), CPU)
    assert isinstance(peer, Theirs)
    before = [parameter.detach().clone() for parameter in peer.model.parameters()]
    peer.step()
    torch.compiler.reset()
    after = peer.model.parameters()
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_peer_that_is_not_installed_is_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file = tmp_path / "run.toml"
    file.write_text(FILE)
    with pytest.raises(ConfigError, match="torchtitan is not installed"):
        bench.main(TrainBenchConfig(config=file, peers=("torchtitan",), vocabulary=64))
    assert not capsys.readouterr().err


def test_peers_take_no_steps_of_muon(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(FILE)
    options = TrainBenchConfig(
        config=file, set=("optimizer.kind=muon",), peers=("plain",), vocabulary=64
    )
    with pytest.raises(ConfigError, match=r"--set optimizer\.kind=adamw"):
        bench.main(options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), TypeError("no such option")])
def test_a_peer_that_cannot_run_is_left_out(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(engine: Theirs) -> None:
        raise error

    monkeypatch.setattr(Theirs, "step", failing)
    file, out = tmp_path / "run.toml", tmp_path / "train.json"
    file.write_text(FILE)
    options = TrainBenchConfig(
        config=file, forms=("dense",), peers=("plain",), steps=1, rounds=2, vocabulary=64, out=out
    )
    assert bench.main(options) == 0
    [result] = load(out).results
    assert result.peer is UNSET
    assert "plain is left out" in capsys.readouterr().err
