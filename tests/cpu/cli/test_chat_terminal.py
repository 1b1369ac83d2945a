"""`fourfold chat` at a terminal: replies stream, Ctrl-C stops one, Ctrl-D leaves."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals here", allow_module_level=True)

from tests.cpu.cli.terminal import Terminal

CTRL_C, CTRL_D = b"\x03", b"\x04"


def test_a_talk(served: Path, tmp_path: Path, small: Sequence[str]) -> None:
    """The model never ends by itself: each reply would go on to the end of its long context."""
    patient = tmp_path / "patient"
    shutil.copytree(served, patient)
    config = json.loads((patient / "config.json").read_text())
    (patient / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20_000}))
    with Terminal(["chat", str(patient), *small[1:], "--seed", "3"]) as terminal:
        assert "/reset" in terminal.wait_for("\r\n> ")
        terminal.type("tell me everything\n")
        terminal.wait_for("tell me everything\r\n", more=20)
        terminal.type(CTRL_C)
        first = terminal.wait_for("(stopped)\r\n> ")
        assert len(first) < 3000, "a reply is stopped, not hidden"
        terminal.type("/reset\n")
        terminal.wait_for("(forgotten)\r\n> ")
        terminal.type("again\n")
        terminal.wait_for("again\r\n", more=20)
        terminal.type(CTRL_C)
        terminal.wait_for("(stopped)\r\n> ")
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0
        assert b"Traceback" not in terminal.shown


def test_bytes_that_are_no_text_and_leaving_with_ctrl_c(small: Sequence[str]) -> None:
    with Terminal(["chat", *small, "--max-tokens", "4"]) as terminal:
        terminal.wait_for("\r\n> ")
        terminal.type(b"\xff\xfe\n")
        terminal.wait_for("\r\n> ")
        terminal.type("hello\n")
        terminal.wait_for("hello\r\n")
        terminal.wait_for("\r\n> ")
        assert terminal.leave_by(CTRL_C) == 0
        assert b"Traceback" not in terminal.shown
