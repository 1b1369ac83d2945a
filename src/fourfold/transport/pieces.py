"""What is sent and where it lands: runs of a transfer, and the receiver's side of one lease.

A lease is a set of pages that a receiver keeps for one transfer. Memory is anything with the buffer
protocol, as flat memoryviews of bytes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Protocol


class Part(enum.IntEnum):
    """Which rows of a sequence a run carries."""

    PAGES = 0
    """Records of finished pages."""
    OPEN = 1
    """Rows of the page that is still filling."""


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One run of a transfer, sent as one or more frames."""

    part: Part
    layer: int
    first: int
    """Of the lease's list of pages; 0 for open rows."""
    count: int
    """Pages, all of one size; 1 for open rows."""
    data: Sequence[memoryview]
    """Where the run lies at the sender, in order. Stays unchanged until the transfer is done."""


class Landing(Protocol):
    """The receiver's side of one lease. Its methods are called from the transport's threads."""

    @property
    def layers(self) -> int: ...

    @property
    def pages(self) -> int:
        """Of each layer; complete when every page of every layer came."""
        ...

    @property
    def open(self) -> bool:
        """Whether open rows are expected too, one run a layer."""
        ...

    def views(self, part: Part, layer: int, first: int, count: int) -> Sequence[memoryview]:
        """Writable memory for a run, in order. Raises `LookupError` if the lease has no such run.

        Written to until the lease is done or forgotten.
        """
        ...

    def landed(self, part: Part, layer: int, layers: int, first: int, count: int) -> int:
        """A run is there, in so many layers, and is what was sent. What this raises fails the
        transfer: the run does not count before it returns. Not called for pages in parts.

        Returns the bytes of pages that it copied out of a GPU's memory, where the run only said
        which; 0 where the run was the pages."""
        ...
