"""What a checkpoint offers a loader: its configuration and its tensors under Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from fourfold.models.checkpoint.streaming import StreamingReader


class Checkpoint(Protocol):
    """Tensors that are read once, in the order that suits the file."""

    where: str
    """What errors call this checkpoint."""

    def fields(self) -> Mapping[str, Any]:
        """The configuration, spelled as in a Hugging Face config.json."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor it holds."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor as stored."""
        ...

    def tensors(
        self, names: set[str], reader: StreamingReader | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The named tensors on the CPU, memory-mapped if possible, in the order of the file.

        With a reader they come on its device where the file holds them as they are, each to be used
        before the next is asked for (`StreamingReader.read`).
        """
        ...
