"""Telling checkpoints apart without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fourfold.models.checkpoint.source import Source

_SAMPLE_BYTES = 1 << 20
_WEIGHTS = (".safetensors", ".gguf")


def fingerprint(source: Source) -> str:
    """A short text that is equal for copies of a checkpoint, wherever they lie.

    Configuration files count whole, files of weights by their size, beginning and end.
    """
    digest = hashlib.blake2b(source.kind.value.encode(), digest_size=8)
    for path in _files(source.path):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, path.stat().st_size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    weights = (file for file in path.iterdir() if file.suffix in _WEIGHTS and file.is_file())
    return sorted([path / "config.json", *weights])
