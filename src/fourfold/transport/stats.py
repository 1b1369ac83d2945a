"""What came of the links to and from each peer: the figures behind metrics and log lines."""

from __future__ import annotations

import msgspec


class PathStats(msgspec.Struct, frozen=True, kw_only=True):
    """One direction between this node and one peer, since this node began."""

    peer: str
    sends: bool
    """Whether this node is the one that sends."""
    path: str
    """Such as "tcp x2" or "shared memory"; empty until a link stood."""
    connected: bool
    bytes: int
    """Of payloads that were sent, or that arrived and were right."""
    seconds: float
    """While at least one payload was under way."""
    frames: int
    links: int
    """That stood so far: more than one means that some broke."""
    round_trip: float
    """Of the last heartbeat, in seconds; 0 where none came back yet, or at the receiver."""
    duplicate: int
    """Frames that came again, at the receiver, like the next three."""
    stale: int
    """Frames for another incarnation, or for a lease that is unknown, forgotten or over."""
    corrupt: int
    """Frames whose checksum was wrong."""
    failed: int
    """Transfers that failed."""

    @property
    def rate(self) -> float:
        """Bytes per second while busy; 0 before anything came."""
        return self.bytes / self.seconds if self.seconds else 0.0
