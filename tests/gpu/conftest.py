"""These tests need a GPU. Without one they are not collected, and the header says so."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"tests/gpu: on {torch.cuda.get_device_name()}"
    return "tests/gpu: no GPU here, nothing collected"
