"""`fourfold corpus sample`: text i depends on the options and i alone, however often it stops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fourfold.cli.main import run
from fourfold.train.data.config import TokenizeConfig
from fourfold.train.data.tokenizing import tokenize


def sample(drawing: Sequence[str], out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    line = ["corpus", "sample", *drawing, "--out", str(out), "--tokens", "6", *arguments]
    code = run([*line, "--documents", "5"] if "--documents" not in arguments else line)
    return code, [json.loads(text) for text in out.read_text().splitlines()]


def test_a_stopped_run_is_continued(
    drawing: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, whole = sample(drawing, tmp_path / "whole.jsonl")
    assert code == 0
    assert [text["index"] for text in whole] == list(range(5))
    assert len({text["text"] for text in whole}) == 5
    out = tmp_path / "part.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert sample(drawing, out) == (0, whole)
    capsys.readouterr()
    assert sample(drawing, out) == (0, whole)
    assert "already holds 5 texts" in capsys.readouterr().err
    for other in (["--seed", "1"], ["--temperature", "0.5"], ["--top-p", "0.5"], ["--tokens", "7"]):
        code, _ = sample(drawing, out, *other, "--documents", "6")
        assert code == 2
        assert "line 1 is of another model, seed or opening, or was" in capsys.readouterr().err


def test_openings_begin_texts_in_turn(drawing: Sequence[str], tmp_path: Path) -> None:
    openings = tmp_path / "openings.txt"
    openings.write_text("the expert\n\na token\n")
    code, texts = sample(drawing, tmp_path / "out.jsonl", "--openings", str(openings))
    assert code == 0
    begins = ["the expert", "a token"] * 3
    assert all(t["text"].startswith(b) for t, b in zip(texts, begins, strict=False))
    out = tmp_path / "shards"
    metas = tokenize(TokenizeConfig(inputs=(tmp_path / "out.jsonl",), out=out, train_bpe=257), None)
    assert sum(meta.documents for meta in metas.values()) == 5
