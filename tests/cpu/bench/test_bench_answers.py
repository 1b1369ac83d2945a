"""Answers of a process are not mixed with what libraries print in it."""

from __future__ import annotations

import signal
import subprocess
import sys

import msgspec

from fourfold.bench.answers import command_of
from fourfold.bench.transport.messages import Answer, Copy

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


def test_ctrl_c_ends_a_process_without_a_word() -> None:
    """One that waits for connections, the far process of `bench transport`."""
    pipe = subprocess.PIPE
    command = command_of("fourfold.bench.transport.far")
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as far:
        assert far.stdin is not None
        assert far.stdout is not None
        far.stdin.write(msgspec.json.encode(Copy(streams=1, chunk=1, length=1)) + b"\n")
        far.stdin.flush()
        assert msgspec.json.decode(far.stdout.readline(), type=Answer).port
        far.send_signal(signal.SIGINT)
        _, said = far.communicate()
    assert far.returncode == -signal.SIGINT
    assert said == b""
