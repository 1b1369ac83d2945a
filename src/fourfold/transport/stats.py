"""What came of the links to and from each peer: the figures behind metrics and log lines."""

from __future__ import annotations

import threading
import time

import msgspec

SHARED_MEMORY = "shared memory"
DEVICE_MEMORY = "device memory"
"""Paths; others are such as "tcp x2" and "rdma (ucx over mlx5_0)". By the last the receiver copies
pages out of a GPU, and only where they lie is sent."""


def tcp(streams: int) -> str:
    """The path by so many connections."""
    return f"tcp x{streams}"


class PathStats(msgspec.Struct, frozen=True, kw_only=True):
    """One direction between this node and one peer, since this node began."""

    peer: str
    sends: bool
    """Whether this node is the one that sends."""
    path: str
    """That the last pages took; before any, the one that is expected. Empty until a link stood."""
    connected: bool
    """Whether a link stands now."""
    bytes: int
    """Of pages that were sent, or that arrived and were right, whichever way they took."""
    seconds: float
    """While at least one payload was under way."""
    frames: int
    links: int
    """That stood so far: more than one means that some broke."""
    tested: float
    """Bytes per second in the test of the last link, at the sender."""
    tested_path: str
    """By which the test went; pages may take another."""
    round_trip: float
    """Of the last heartbeat, in seconds; 0 where none came back yet, or at the receiver."""
    duplicate: int
    """Frames that came again, at the receiver, like the next three."""
    stale: int
    """Frames for another incarnation, or for a lease that is unknown, forgotten or over."""
    corrupt: int
    """Frames whose checksum was wrong."""
    failed: int
    """Transfers that failed; not those that either side gave up."""

    @property
    def rate(self) -> float:
        """Bytes per second while busy; 0 before anything came, and at the sender for memory that
        the receiver reads."""
        copied_there = self.sends and not self.path.startswith("tcp")
        return self.bytes / self.seconds if self.seconds and not copied_there else 0.0


class Counters:
    """Counts for one direction and peer; every link between the two adds to the same ones.

    For any thread. Counts of events are plain attributes, changed by `add` only.
    """

    def __init__(self, peer: str, *, sends: bool) -> None:
        self._lock = threading.Lock()
        self._peer, self._sends = peer, sends
        self._bytes, self._frames, self._seconds = 0, 0, 0.0
        self._events = dict.fromkeys(("links", "duplicate", "stale", "corrupt", "failed"), 0)
        self._under_way, self._since = 0, 0.0
        self._standing = 0
        self._path = ""
        self.tested, self.tested_path = 0.0, ""
        self.round_trip = 0.0

    def stands(self) -> None:
        """A link stands; `broke` follows."""
        with self._lock:
            self._events["links"] += 1
            self._standing += 1

    def broke(self) -> None:
        """A link that stood has ended; another may stand since."""
        with self._lock:
            self._standing -= 1

    def begin(self) -> None:
        """A payload is under way."""
        with self._lock:
            if not self._under_way:
                self._since = time.perf_counter()
            self._under_way += 1

    def expect(self, path: str) -> None:
        """The way that pages will take, as far as it is known before any took one."""
        with self._lock:
            if not self._frames:
                self._path = path

    def end(self, count: int, path: str) -> None:
        """It is no more, and so many bytes of pages took this way and were right; 0 where it
        failed."""
        with self._lock:
            self._under_way -= 1
            if not self._under_way:
                self._seconds += time.perf_counter() - self._since
            if count:
                self._bytes += count
                self._frames += 1
                self._path = path

    def add(self, event: str) -> None:
        """Counts one of `duplicate`, `stale`, `corrupt` and `failed`."""
        with self._lock:
            self._events[event] += 1

    def stats(self) -> PathStats:
        """All of it as it is now."""
        with self._lock:
            running = time.perf_counter() - self._since if self._under_way else 0.0
            return PathStats(
                peer=self._peer,
                sends=self._sends,
                path=self._path,
                connected=self._standing > 0,
                bytes=self._bytes,
                seconds=self._seconds + running,
                frames=self._frames,
                tested=self.tested,
                tested_path=self.tested_path,
                round_trip=self.round_trip,
                **self._events,
            )
