"""Answers of a process are not mixed with what libraries print in it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os
from fourfold.bench.answers import take_stdout
answers = take_stdout()
os.write(1, b"a library in C\\n")
print("a library", flush=True)
answers.write(b"an answer")
answers.close()
"""


def test_what_else_is_printed_goes_to_the_standard_error() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert done.stdout == b"an answer"
    assert done.stderr == b"a library in C\na library\n"
