"""Memory of a peer that described payloads lie in, however this side reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from fourfold.transport.frames import Fields
from fourfold.transport.memory import Staging

Fill = Callable[[Sequence[memoryview], Staging], int]
"""Puts a payload into views of as many bytes, by a stream's staging, and returns the checksum of
what is there now. Raises `ReadError` where it cannot be had."""


class ReadError(OSError):
    """A peer's memory cannot be read any more; `str(error)` says why. Its link is of no use."""


class Source(Protocol):
    """A peer's regions, by number."""

    @property
    def path(self) -> str:
        """What this way is called in figures."""
        ...

    def find(self, extents: Sequence[Fields]) -> Fill:
        """What reads these pieces. Raises `FrameError` for one outside of the regions."""
        ...

    def close(self) -> None:
        """Gives everything back; nothing may be reading."""
        ...
