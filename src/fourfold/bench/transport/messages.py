"""What the sending process asks of the receiving one, and what that answers: lines of JSON."""

from __future__ import annotations

import msgspec

from fourfold.transport import TransportPath

WAIT_SECONDS = 60.0


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Receive `length` bytes over so many plain sockets, `chunk` at a time."""

    streams: int
    chunk: int
    length: int


class Open(msgspec.Struct, frozen=True, tag=True):
    """Make memory and a node that takes pages by a path."""

    path: TransportPath
    streams: int | None
    pages: int
    page_bytes: int
    run_pages: int


class Receive(msgspec.Struct, frozen=True, tag=True):
    """Expect pages for a lease, with or without looking at their checksums."""

    lease: int
    verify: bool


class OpenDevice(msgspec.Struct, frozen=True, tag=True):
    """Make pages on the GPU, map those of the other side, and make a node to pull them."""

    pages: int
    page_bytes: int
    run_pages: int
    streams: int | None
    node: bytes
    """The other side's `Peer`, as JSON."""


class Pull(msgspec.Struct, frozen=True, tag=True):
    """Expect pages on the GPU for a lease."""

    lease: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command, as far as it has a field here."""

    port: int = 0
    node: bytes = b""
    """The node's `Peer`, as JSON."""
    cpu: float = 0.0
    """Seconds of this process."""
    error: str | None = None
    digest: int = 0
    """Checksum of all pages in their order."""
    moving: float = 0.0
    """Seconds for which pages of a GPU were moved and compared."""


Command = Copy | Open | Receive | OpenDevice | Pull
