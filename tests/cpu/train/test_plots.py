"""`fourfold train plot`: every figure of a run lies where its metrics say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from fourfold.cli.main import run
from fourfold.train import plots
from fourfold.train.metrics import EvaluationRecord, Record, StepRecord


def step(number: int, loss: float, **fields: Any) -> StepRecord:
    return StepRecord(
        step=number,
        tokens=100 * number,
        loss=loss,
        gradient_norm=loss / 10,
        rate=0.1,
        tokens_per_second=loss * 100,
        **fields,
    )


def evaluation(number: int, loss: float) -> EvaluationRecord:
    return EvaluationRecord(
        step=number, tokens=100 * number, held_out_loss=loss, evaluated_tokens=9
    )


SPARSE: list[Record] = [
    step(10, 4.0, load_most=2.0, load_least=0.5, dead_experts=0),
    step(20, 3.0),
    step(25, 9.0, load_most=3.0, load_least=0.0, dead_experts=1, spike=True),
    evaluation(25, 3.5),
]
DENSE: list[Record] = [step(10, 5.0), evaluation(10, 4.5), step(20, 4.0), evaluation(20, 4.25)]


def written(folder: Path, records: list[Record]) -> Path:
    folder.mkdir(parents=True)
    lines = [msgspec.json.encode(record) + b"\n" for record in records]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    return folder


def test_runs_lie_over_each_other(tmp_path: Path) -> None:
    folders = [written(tmp_path / "sparse", SPARSE), written(tmp_path / "dense", DENSE)]
    runs = plots._read(folders)
    figure = plots._figure(runs, "tokens")
    loss, held_out, norm, speed, load, legend = (
        [
            [tuple(map(float, point)) for point in line.get_xydata().tolist()]  # type: ignore[union-attr]
            for line in axes.lines
        ]
        for axes in figure.axes
    )
    assert loss == [
        [(1000, 4), (2000, 3), (2500, 9)],
        [(2500, 9)],
        [(1000, 5), (2000, 4)],
    ]
    assert held_out == [[(2500, 3.5)], [(1000, 4.5), (2000, 4.25)]]
    assert norm == [[(x, y / 10) for x, y in line] for line in (loss[0], loss[2])]
    assert speed == [[(x, y * 100) for x, y in line] for line in (loss[0], loss[2])]
    assert load == [[(1000, 2), (2500, 3)], [(1000, 0.5), (2500, 0)]]
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == [
        "sparse",
        "dense",
    ]
    assert len(legend) == 2
    by_step = plots._figure(runs, "step").axes[0].lines[0]
    assert list(by_step.get_xdata()) == [10, 20, 25]  # type: ignore[arg-type]


def test_a_run_without_experts_says_so(tmp_path: Path) -> None:
    figure = plots._figure(plots._read([written(tmp_path / "dense", DENSE)]), "step")
    said = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert said == [[], [], [], [], ["not in these runs"], []]


def test_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of more runs than there are colours of a cycle; those of one name get their paths."""
    folders = [written(tmp_path / str(number) / "run", SPARSE) for number in range(11)]
    command = ["train", "plot", *map(str, folders), "--out"]
    assert run([*command, str(tmp_path / "one")]) == 0
    paths = [tmp_path / "one" / f"by-{place}.svg" for place in ("step", "tokens")]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in paths]
    assert run([*command, str(tmp_path / "two")]) == 0
    for path in paths:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert [each.name for each in plots._read(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no metrics; name the run.folder of a run"),
        ("half a li", "has no metrics"),
        ('{"step": 1}\n', "cannot be read as metrics of a run"),
        ("7\n", "cannot be read as metrics of a run"),
    ],
)
def test_a_folder_without_metrics_is_named(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert run(["train", "plot", str(tmp_path), "--out", str(tmp_path / "plots")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fourfold: {tmp_path / 'metrics.jsonl'} ")
    assert said in line
    assert not (tmp_path / "plots").exists()


def test_what_cannot_be_drawn_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(written(tmp_path / "run", SPARSE))
    assert run(["train", "plot", folder, f"{folder}/../run", "--out", str(tmp_path)]) == 2
    assert "is named twice" in capsys.readouterr().err
    assert run(["train", "plot", folder, "--out", str(tmp_path), "--form", "gif"]) == 2
    assert "--form gif: take svg, png or pdf" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(["train", "plot", folder, "--out", str(tmp_path / "file")]) == 2
    assert f"{tmp_path / 'file'} cannot be written" in capsys.readouterr().err
