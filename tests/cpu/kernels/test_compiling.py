"""Noting launches and compiling what they need, without a GPU; what is compiled is not run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def elsewhere(tmp_path: Path, *arguments: str) -> Any:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cpu.kernels.compiled_elsewhere", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_noted_launches_are_what_is_compiled_and_nothing_runs(tmp_path: Path) -> None:
    """Constants that are called like types, and sizes that compile to forms of their own."""
    twice = ["_draw", "_move_kernel", "_quantize_kernel"]
    noted = ["_newest", "_scan", "decode_kernel", "wide_kernel", *["scale"] * 3, *twice * 2]
    assert elsewhere(tmp_path) == {
        "first": sorted(noted),
        "again": 0,
        "other": 1,
        "made": 1,
        "late": ["scale"],
    }


def test_a_kernel_that_does_not_compile_is_an_error_and_no_process_is_left(tmp_path: Path) -> None:
    assert "redefines it as int32" in elsewhere(tmp_path, "fail")
