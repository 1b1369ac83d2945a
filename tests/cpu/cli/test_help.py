"""Help and wrong arguments are answered at once, without the libraries that compute."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fourfold
from fourfold.cli.main import COMMANDS, run

HEAVY = {"torch", "transformers", "gguf", "triton", "huggingface_hub"}
PROGRAM = [sys.executable, "-c", "from fourfold.cli.main import main; main()"]


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_names_every_command(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([word]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for name in COMMANDS:
        assert f"  {name} " in said.out


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_of_several_commands_names_these(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["law", word]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    named = {name for name in COMMANDS if f"\n  {name} " in said.out}
    assert named == {name for name in COMMANDS if name.startswith("law ")}


def test_no_command_shows_the_same_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "usage: fourfold COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([word]) == 0
    assert capsys.readouterr().out == f"fourfold {fourfold.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_calls_things_by_their_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No types for names, no `None` that stands for what the text says, no option without one."""
    with pytest.raises(SystemExit) as end:
        run([*name.split(), "--help"])
    page = capsys.readouterr().out
    assert not end.value.code
    assert page.startswith(f"usage: fourfold {name} [-h]")
    assert "None" not in page
    assert not re.search(r"\(default:[\s\u2502]*\)", page)
    assert not re.search(r"(STR|INT|FLOAT|PATH)[\s\u2502]*\((default|required)", page)


def test_help_names_what_has_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["generate", "--help"])
    assert "[OPTIONS] INPUT [OUTPUT] [MODEL]\n" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("line", ["--help", "serve --help"])
def test_help_that_finds_no_room(line: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, *line.split()], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith(b"fourfold: nothing more can be written")
    assert done.stderr.count(b"\n") == 1


def test_nothing_heavy_is_loaded_for_help_and_for_mistakes(tmp_path: Path) -> None:
    lines = [[*name.split(), "--help"] for name in COMMANDS]
    lines += [
        ["--help"],
        ["nonsense"],
        ["serve", "--prot", "1"],
        ["serve", "--port", "one"],
        ["serve", "--max-running", "0"],
        ["serve", str(tmp_path / "no-model")],
        ["chat", str(tmp_path)],
        ["chat", "--precision", "int3"],
        ["generate", str(tmp_path / "missing.jsonl")],
    ]
    script = f"""
import sys
from fourfold.cli.main import run
codes = []
for arguments in {lines!r}:
    try:
        codes.append(run(arguments))
    except SystemExit as end:
        codes.append(end.code)
    loaded = sorted({HEAVY!r} & set(sys.modules))
    assert not loaded, (arguments, loaded)
print(codes, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]
    codes = [0] * (len(COMMANDS) + 1) + [2] * 8
    assert done.stderr.splitlines()[-1] == repr(codes)
