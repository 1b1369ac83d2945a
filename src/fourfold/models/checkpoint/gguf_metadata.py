"""A GGUF file and the values in its header. Imports no torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf

from fourfold.errors import CheckpointError


@functools.lru_cache(maxsize=1)
def read_gguf(path: Path) -> gguf.GGUFReader:
    """The opened file; kept, because weights and tokenizer both read it."""
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file ({error})") from error


def read_value(reader: gguf.GGUFReader, key: str) -> Any:
    """A metadata value as Python's own type, None where it is absent."""
    field = reader.get_field(key)
    return None if field is None else field.contents()
