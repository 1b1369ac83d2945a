"""The tiny model that commands are tried with draws texts here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cpu.cli.conftest import served
from tests.cpu.gateway import made_tokenizers

__all__ = ["drawing", "served"]


@pytest.fixture
def drawing(served: Path, tmp_path: Path) -> Sequence[str]:
    """The model as arguments; its tokenizer names the mark that begins a text."""
    path = tmp_path / "tiny"
    shutil.copytree(served, path)
    made_tokenizers.write(path, made_tokenizers.byte_level(), bos_token="<|bos|>")
    return (str(path), "--precision", "float32", "--device", "cpu", "--kv-memory-gib", "0.02")
