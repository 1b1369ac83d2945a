"""Noting launches and compiling what they need, without a GPU; what is compiled is not run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_noted_launches_are_what_is_compiled_and_nothing_runs(tmp_path: Path) -> None:
    """Constants that are called like types, and sizes that compile to forms of their own."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cpu.kernels.compiled_elsewhere"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "first": ["_quantize_kernel", "_quantize_kernel", "scale", "scale", "scale"],
        "again": 0,
        "other": 1,
        "made": 1,
        "late": ["scale"],
    }
