"""A training configuration is checked whole, and every error says which field to change."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.errors import ConfigError
from fourfold.train.config import read_config
from fourfold.train.loop import captures, choose_dtype
from fourfold.train.parallel import Parallel
from fourfold.train.schedule import bias_moves, rate_at
from tests.cpu.train import toy

TEXT = """
[model]
layers = 2
width = 32
heads = 2
kv_heads = 1
head_width = 16
experts = 4
experts_per_token = 2
expert_width = 16
[data]
train = "shards"
[schedule]
steps = 200
[run]
folder = "here"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TEXT)
    return path


def test_a_file_and_what_overrides_it(file: Path) -> None:
    config = read_config(file, ["model.layers=3", "run.folder=there", "optimizer.rate = 1e-4"])
    assert (config.model.layers, config.run.folder, config.optimizer.rate) == (3, "there", 1e-4)
    assert config.data.train == "shards"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.layers=two", r"model\.layers = 'two'"),
        ("model.layers=0", r"run\.toml: model\.layers = 0"),
        ("model.layers=100000000000", r"model\.layers = 100000000000 is more than 1024"),
        ("model.width=100000000000", r"model\.width = 100000000000 is more than"),
        ("model.shared_experts=100000000", r"model\.shared_experts = 100000000 is more than"),
        ("model.depth=2", r"`depth` in \[model\]; its fields are layers, width"),
        ("modle.layers=2", "`modle`; the sections are model, data"),
        ("layers=2", "section.field=value"),
        ("model.experts_per_token=5", r"model\.experts = 4"),
        ("model.kv_heads=3", r"model\.kv_heads = 3"),
        ("model.head_width=24", r"model\.head_width = 24"),
        ("model.head_width=512", r"model\.head_width = 512"),
        ("model.experts=1032", r"model\.experts = 1032"),
        ("data.held_out=shards", r"data\.held_out = shards"),
        ("optimizer.beta1=1", r"optimizer\.beta1 = 1"),
        ("optimizer.momentum=1", r"optimizer\.momentum = 1"),
        ("model.dense_layers=2", r"model\.dense_layers = 2"),
        ("model.shared_experts=1", r"model\.shared_experts = 1"),
        ("model.width=36", r"model\.width = 36"),
        ("model.expert_width=20", r"model\.expert_width = 20"),
        ("router.score=sigmoid", r"model\.shared_experts = 0"),
        ("router.score=relu", r"router\.score = 'relu': .*use \"softmax\" or \"sigmoid\""),
        ("router.gate_scale=0", r"router\.gate_scale = 0"),
        ("router.bias_frozen=2", r"router\.bias_frozen = 2"),
        ("optimizer.rate=0", r"optimizer\.rate = 0"),
        ("optimizer.rate=inf", r"optimizer\.rate = inf"),
        ("optimizer.kind=sgd", r"optimizer\.kind = 'sgd': .*use \"adamw\" or \"muon\""),
        ("schedule.warmup=190", r"schedule\.warmup = 190"),
        ("data.length=5000", r"model\.max_positions = 4096"),
        ("run.keep=0", r"run\.keep = 0"),
        ("run.dtype=float16", r"run\.dtype = 'float16'"),
        ("parallel.experts=3", r"parallel\.experts = 3"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_config(file, [override])
    assert "\n" not in str(caught.value)


def test_a_missing_section_or_file_is_named(file: Path) -> None:
    file.write_text(TEXT.replace("[schedule]\nsteps = 200\n", ""))
    with pytest.raises(ConfigError, match="schedule"):
        read_config(file)
    with pytest.raises(ConfigError, match=r"none\.toml"):
        read_config(file.with_name("none.toml"))
    file.write_text("steps = ")
    with pytest.raises(ConfigError, match="TOML"):
        read_config(file)


def test_rows_that_cannot_be_dealt_are_refused(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"run": {"micro_rows": 3}}
    with pytest.raises(ConfigError, match=r"run\.micro_rows = 3"):
        toy.trainer(toy.config(tmp_path, changes))


def test_the_rate_rises_stays_and_falls(tmp_path: Path) -> None:
    schedule = toy.config(
        tmp_path, {"schedule": {"steps": 100, "warmup": 10, "decay": 0.2, "final": 0.1}}
    ).schedule
    rates = [rate_at(step, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert all(before > after for before, after in itertools.pairwise(rates[79:]))
    assert 0.1 < rates[-1] < 0.15
    moves = [bias_moves(step, schedule, 0.05) for step in (0, 94, 95, 99)]
    assert moves == [True, True, False, False]


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cpu", torch.float32),
        ("float32", "cuda", None),
    ],
)
def test_what_is_computed_in(
    asked: str, device: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    config = toy.config(tmp_path, {"run": {"dtype": asked}})
    if dtype is None:
        with pytest.raises(ConfigError, match=r"run\.dtype"):
            choose_dtype(config, torch.device(device))
    else:
        assert choose_dtype(config, torch.device(device)) == dtype


def test_a_step_is_captured_where_one_process_trains_on_a_gpu(tmp_path: Path) -> None:
    gpu = Parallel(0, 1, torch.device("cuda"))
    given = {each: toy.config(tmp_path, {"run": {"cuda_graph": each}}) for each in (True, False)}
    assert captures(toy.config(tmp_path), gpu, 16)
    assert not captures(toy.config(tmp_path), gpu, 17)
    assert captures(given[True], gpu, 17)
    assert not captures(given[False], gpu, 1)
    assert not captures(toy.config(tmp_path), toy.ALONE, 1)
    with pytest.raises(ConfigError, match="leave it out"):
        captures(given[True], toy.ALONE, 1)
