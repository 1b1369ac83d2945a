"""`fourfold corpus packages`: every text once, with the licence its package states."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fourfold.cli.main import run
from fourfold.train.data.debian_texts import manual_text
from fourfold.train.data.python_texts import docstrings

MIT = "Permission is hereby granted, free of charge, to any person obtaining a copy " * 3
PROSE = "A router gives every token to few experts, and the experts share the work. "

MANUAL = r"""'\" t
.\" a comment
.de XX
not said
..
.TH EXPERT 1 "2026"
.SH NAME
expert \- chooses
.SH "SEE ALSO"
.BR router (1),
.I the \fBother\fR page
.TS
l l.
a table
.TE
.TP
.B \-\-help
Don\(aqt \s-1SHOUT\s0\&.
.Nm expert
"""


def package(folder: Path, name: str, metadata: str, files: dict[str, str]) -> None:
    """An installed Python package."""
    info = f"{name}-1.0.dist-info"
    files = files | {f"{info}/METADATA": f"Name: {name}\nVersion: 1.0\n{metadata}"}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with two Python packages of known licence, one of none, and a Debian package."""
    python = tmp_path / "python"
    stated, texted, unknown = "License-Expression: BSD-3-Clause\n", "", ""
    long = f'"""{PROSE}"""\n' + "number = 1\n" * 200 + f'class A:\n    """{PROSE * 3}"""\n'
    package(
        python,
        "alpha",
        stated,
        {
            "alpha/one.py": f"# {PROSE}\n",
            "alpha/copy.py": f"# {PROSE}\n",
            "alpha/long.py": long,
            "alpha/short.py": "x = 1\n",
            "alpha/table.py": "1, 2, 3, 4; " * 40,
            "alpha/wide.md": "word " * 500,
            "alpha/data.bin": PROSE,
        },
    )
    package(
        python, "beta", texted, {"beta/notes.rst": PROSE * 2, "beta-1.0.dist-info/LICENSE": MIT}
    )
    package(python, "gamma", unknown, {"gamma/a.py": f"# gamma: {PROSE}\n"})
    doc = tmp_path / "share/doc/delta"
    doc.mkdir(parents=True)
    (doc / "copyright").write_text("Files: *\nLicense: GPL-2\n\nFiles: x\nLicense: Zlib\n")
    (doc / "README.gz").write_bytes(gzip.compress(f"delta: {PROSE}".encode()))
    page = f"<head><title>no</title></head><p>page: {PROSE}<br>A &lt;b&gt;</p><script>no</script>"
    (doc / "page.html").write_text(page)
    (doc / "changelog.gz").write_bytes(gzip.compress(PROSE.encode()))
    (tmp_path / "share/man/man1").mkdir(parents=True)
    return tmp_path


def gather(machine: Path, *arguments: str) -> list[dict[str, Any]]:
    folders = ["--python", machine / "python", "--debian", machine / "share"]
    line = ["corpus", "packages", "--out", machine / "out", *folders, *arguments]
    assert run([str(word) for word in line]) == 0
    files = sorted((machine / "out").glob("*.jsonl.gz"))
    return [json.loads(line) for file in files for line in gzip.open(file, "rt")]


SIZES = ("--fewest-characters", "50", "--most-characters", "1200")


def test_texts_are_gathered_once_with_their_licence(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {text.pop("path"): text for text in gather(machine, *SIZES)}
    assert list(texts) == [
        "alpha/copy.py",
        "alpha/long.py",
        "beta/notes.rst",
        "doc/delta/README.gz",
        "doc/delta/page.html",
    ]
    licences = [text["licence"] for text in texts.values()]
    assert licences == ["BSD-3-Clause"] * 2 + ["MIT"] + ["GPL-2, Zlib"] * 2
    assert texts["alpha/long.py"]["text"] == f"{PROSE}\n\n\nA\n\n{PROSE * 3}"
    assert texts["doc/delta/page.html"]["text"] == f"page: {PROSE.strip()}\nA <b>\n"
    summary = json.loads((machine / "out/sources.json").read_text())
    assert summary["documents"] == 5
    assert summary["bytes"] == sum(len(text["text"]) for text in texts.values())
    assert summary["left_out"] == {
        "a copy": 1,
        "long": 1,
        "no known licence": 1,
        "no prose or code": 1,
        "short": 1,
    }
    assert [s["name"] for s in summary["sources"]] == ["alpha", "delta", "beta"]
    assert "3 packages" in capsys.readouterr().err


def test_a_text_made_from_another_is_left_out(tmp_path: Path) -> None:
    lines = [f"token {i} goes to expert {i * i}\n" for i in range(40)]
    changed = [f"token {i} goes to no expert at all\n" for i in range(40)]
    stated = "License-Expression: MIT\n"
    texts = {
        "alpha/a.md": "".join(lines),
        "alpha/b.md": "".join(lines[:30] + changed[:10]),  # more than half is known
        "alpha/c.md": "".join(lines[:10] + changed[:30]),
        "alpha/d.md": "x = 1\n" * 40 + "".join(changed[30:]),  # short lines tell nothing
        "alpha/e.md": "x = 1\n" * 41,
    }
    package(tmp_path / "python", "alpha", stated, texts)
    assert [t["path"][6:] for t in gather(tmp_path)] == ["a.md", "c.md", "d.md", "e.md"]
    summary = json.loads((tmp_path / "out/sources.json").read_text())
    assert summary["left_out"] == {"nearly a copy": 1}


def test_the_same_packages_give_the_same_files(machine: Path) -> None:
    gather(machine, *SIZES)
    files = {path: path.read_bytes() for path in (machine / "out").iterdir()}
    gather(machine, *SIZES)
    assert files == {path: path.read_bytes() for path in (machine / "out").iterdir()}


def test_packages_of_unknown_licence_are_kept_when_asked(machine: Path) -> None:
    texts = gather(machine, *SIZES, "--unknown-licences")
    assert {"gamma": "unknown"}.items() <= {t["package"]: t["licence"] for t in texts}.items()


def test_no_text_at_all_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--out", tmp_path / "out", "--python", tmp_path, "--debian", tmp_path]
    assert run(["corpus", "packages", *map(str, line)]) == 2
    assert "no package gives a text" in capsys.readouterr().err


def test_a_folder_that_is_not_there_leaves_the_corpus_alone(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gather(machine, *SIZES)
    files = {path: path.read_bytes() for path in (machine / "out").iterdir()}
    (machine / "empty").mkdir()
    line = ["--out", machine / "out", "--debian", machine / "empty", "--python", machine / "empty"]
    for also, said in (([machine / "nowhere"], "nowhere is no folder"), ([], "no package gives")):
        assert run(["corpus", "packages", *map(str, [*line, *also])]) == 2
        assert said in capsys.readouterr().err
        assert files == {path: path.read_bytes() for path in (machine / "out").iterdir()}


def test_a_manual_page_is_words() -> None:
    assert manual_text(MANUAL) == (
        "NAME\nexpert - chooses\n\nSEE ALSO\nrouter(1),\nthe other page\n\n--help\n"
        "Don't SHOUT.\nexpert\n"
    )


def test_what_is_no_python_has_no_docstrings() -> None:
    assert docstrings("print 'two'") == ""
