"""`fourfold train` from texts to a directory that answers."""

from __future__ import annotations

import functools
import io
import json
import re
import resource
import shutil
import types
from pathlib import Path
from typing import cast

import pytest
from msgspec import UNSET, UnsetType
from rich.console import Console

from fourfold import LLM
from fourfold.cli.main import run
from fourfold.cli.train import _bar
from fourfold.llm import Asked
from fourfold.train.data.shards import Shards
from fourfold.train.loop import Trainer
from fourfold.train.metrics import EvaluationRecord, StepRecord, read_records
from tests.cpu.train import toy
from tests.cpu.train.test_bench import FILE


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    lines = (f"the {n} cats sat on {n + 1} mats, and {n * n} dogs did not." for n in range(400))
    texts = folder / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    out = folder / "shards"
    command = ["tokenize", str(texts), "--out", str(out), "--train-bpe", "270"]
    assert run([*command, "--held-out", "0.1"]) == 0
    return out


def train(shards: Path, folder: Path, *changes: str) -> int:
    file = folder / "run.toml"
    folder.mkdir(exist_ok=True)
    file.write_text(FILE)
    common = (
        f"data.train={shards / 'train'}",
        f"data.held_out={shards / 'held-out'}",
        f"run.folder={folder / 'run'}",
        "run.evaluate_batches=2",
        "run.log_every=2",
    )
    return run(["train", str(file), "--set", *common, *changes])


def test_a_run_goes_on_and_its_model_answers(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, tmp_path, "schedule.steps=4") == 0
    said = capsys.readouterr().err
    assert "loss" in said
    assert "held-out loss" in said
    assert "qwen3_moe: " in said
    assert "4 steps of 16 tokens; 64 tokens are " in said
    assert said.splitlines()[-1] == f"model: {tmp_path / 'run' / 'model'}"
    assert train(shards, tmp_path, "schedule.steps=6") == 0
    said = capsys.readouterr().err
    assert "6 steps of 16 tokens, from step 4; " in said
    assert "step 2 " not in said
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["schedule"]["steps"], kept["model"]["layers"]) == (6, 1)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    evaluated = [record.step for record in records if isinstance(record, EvaluationRecord)]
    assert evaluated == [4, 6]
    with LLM(tmp_path / "run" / "model", device="cpu", precision="float32") as llm:
        asked: Asked = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
        [answer] = llm.generate(["the 3 cats"], **asked)
    assert len(answer.samples[0].token_ids) == 3


def test_texts_of_another_vocabulary_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    texts = tmp_path / "text.txt"
    texts.write_text("something else " * 100)
    command = ["tokenize", str(texts), "--out", str(other), "--train-bpe", "260"]
    assert run([*command, "--held-out", "0"]) == 0
    assert train(shards, tmp_path, f"data.held_out={other / 'train'}") == 2
    assert "data.held_out" in capsys.readouterr().err


def test_other_texts_than_were_trained_on_are_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "\n".join(json.dumps({"text": f"{n} dogs sat on {n} cats"}) for n in range(90))
    )
    command = ["tokenize", str(texts), "--out", str(other)]
    assert run([*command, "--tokenizer", str(shards / "tokenizer"), "--held-out", "0"]) == 0
    assert train(shards, tmp_path, "schedule.steps=2") == 0
    start = tmp_path / "run" / "checkpoints" / "step-00000002"
    was, now = (Shards(path / "train").contents() for path in (shards, other))
    capsys.readouterr()
    branch = (f"run.start_from={start}", f"run.folder={tmp_path / 'branch'}")
    for elsewhere in ((), branch):
        assert train(shards, tmp_path, f"data.train={other / 'train'}", *elsewhere) == 2
        assert capsys.readouterr().err.strip().splitlines() == [
            f"fourfold: data.train = {now} is other text than {start} was trained on, {was}; use "
            "that, or begin anew with another run.folder and without run.start_from"
        ]
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    more = f"data.train={moved / 'train'}", "schedule.steps=3"
    assert train(shards, tmp_path, *more) == 0
    written = tmp_path / "run" / "checkpoints" / "step-00000003" / "progress.json"
    assert json.loads(written.read_text())["contents"]["folder"] == str(moved / "train")


def test_a_checkpoint_that_does_not_know_its_texts_is_continued(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, tmp_path, "schedule.steps=2") == 0
    written = tmp_path / "run" / "checkpoints" / "step-00000002" / "progress.json"
    fields = json.loads(written.read_text())
    del fields["contents"]
    written.write_text(json.dumps(fields))
    capsys.readouterr()
    assert train(shards, tmp_path, "schedule.steps=3") == 0
    assert ", from step 2; " in capsys.readouterr().err


def test_nothing_held_out_is_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the 3 cats sat on 4 mats " * 100)
    tokenizer = str(shards / "tokenizer")
    command = ["tokenize", str(tmp_path / "text.txt"), "--out", str(tmp_path / "other")]
    assert run([*command, "--tokenizer", tokenizer, "--held-out", "0"]) == 0
    empty = tmp_path / "other" / "held-out"
    assert train(shards, tmp_path, f"data.held_out={empty}") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"data.held_out = {empty} has 0 tokens" in said
    assert "--held-out" in said


def test_an_evaluation_reads_no_text_twice(shards: Path, tmp_path: Path) -> None:
    assert train(shards, tmp_path, "schedule.steps=1", "run.evaluate_batches=100000") == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    [evaluation] = [record for record in records if isinstance(record, EvaluationRecord)]
    held_out = Shards(shards / "held-out").meta
    assert held_out.tokens / 2 < evaluation.evaluated_tokens < held_out.tokens


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.rows=1000", "data.rows = 1000"),
        ("model.vocabulary=100", "model.vocabulary = 100 is less than the 270 ids"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    change: str, said: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, tmp_path, change) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert train(shards, tmp_path, f"run.folder={file}") == 2
    assert f"{file} cannot be written" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_leaves_the_checkpoint_that_there_is(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(shards, tmp_path, "schedule.steps=2") == 0
    folder = tmp_path / "run" / "checkpoints"
    half = (folder / "step-00000002" / "state.safetensors").stat().st_size // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, before[1]))  # files grow no larger
    try:
        assert train(shards, tmp_path, "schedule.steps=4") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"fourfold: {tmp_path / 'run'} cannot be written (")
    assert said.endswith("; set run.folder, or make room")
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert train(shards, tmp_path, "schedule.steps=4") == 0
    assert ", from step 2; " in capsys.readouterr().err


def test_what_goes_wrong_stays_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal: spikes, and dead experts where their number changes."""
    screen = io.StringIO()
    terminal = functools.partial(Console, file=screen, force_terminal=True, width=200)
    monkeypatch.setattr("rich.console.Console", lambda stderr: terminal())
    config = toy.config(Path("nowhere"))
    trainer = cast(Trainer, types.SimpleNamespace(steps=0))
    dead: list[int | UnsetType] = [0, 2, UNSET, 2, 3, 0, 2, 0, 0]
    with _bar(trainer, config, shown=True) as watch:
        for number, count in enumerate(dead, start=1):
            watch(
                StepRecord(
                    step=number,
                    tokens=number,
                    loss=number,
                    gradient_norm=1,
                    rate=1,
                    tokens_per_second=1,
                    dead_experts=count,
                    spike=number == 8,
                )
            )
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", screen.getvalue())
    kept = re.findall(r"step (\d+)  loss [\d.]+  1 tok/s *(.*)\n", plain)
    assert [(step, said.strip()) for step, said in kept] == [
        ("2", "2 experts dead"),
        ("5", "3 experts dead"),
        ("7", "2 experts dead"),
        ("8", "spike"),
    ]


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, tmp_path, "model.layers=0") == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        f"fourfold: {tmp_path / 'run.toml'}: model.layers = 0 must be more than zero, and finite"
    ]
