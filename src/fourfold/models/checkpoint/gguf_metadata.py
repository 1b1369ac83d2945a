"""A GGUF file and the values in its header. Imports no torch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from fourfold.errors import CheckpointError


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """Cuts its hundred thousand pieces out of a plain array: out of a memmap each is made one."""

    @property
    def data(self) -> NDArray[np.uint8]:
        return self._data

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._data = np.asarray(mapped)


@functools.lru_cache(maxsize=1)
def read_gguf(path: Path) -> gguf.GGUFReader:
    """The opened file; kept, because weights and tokenizer both read it."""
    try:
        return _Reader(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); see that it may be"
        ) from error
    except (ValueError, KeyError, IndexError) as error:
        # Of a broken file these tell about arrays.
        raise CheckpointError(
            f"{path} is no whole GGUF file of version 2 or 3; fetch it again"
        ) from error


def read_value(reader: gguf.GGUFReader, key: str) -> Any:
    """A metadata value as Python's own type, None where it is absent."""
    field = reader.get_field(key)
    return None if field is None else field.contents()
