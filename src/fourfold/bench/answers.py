"""How a benchmark starts processes, and what they answer on."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

_QUIET = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "runpy.run_module({!r}, run_name='__main__')"
)


def command_of(module: str) -> list[str]:
    """Runs a module as `python -m` does, in a process that Ctrl-C ends without a word: it reaches
    all processes of a terminal, and whoever started this one tells of it."""
    return [sys.executable, "-c", _QUIET.format(module)]


def take_stdout() -> BinaryIO:
    """The standard output for answers alone: what libraries print there, also from C, goes to the
    standard error from here on."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers
