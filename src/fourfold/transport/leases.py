"""The receiver's leases: which runs have come, who is writing, and how each lease ends.

Only threads of this node write into its pages, and only between `claim` and `land`. A lease ends
when everything came or when something went wrong, but not before the last writer has left; the one
who forgets it is told of that too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from fourfold.transport.control import Complete, Failed
from fourfold.transport.frames import Header
from fourfold.transport.notifier import Notifier
from fourfold.transport.pieces import Landing, Part

Done = Callable[[str | None], None]

_GRACE_SECONDS = 1.0
"""For a writer to leave by itself after its lease was forgotten."""


class Writer(Protocol):
    """The link that a frame came by."""

    lost: bool
    """Whether it has broken: frames that it still brings are too late. `Leases.lose` sets it."""

    @property
    def epoch(self) -> int:
        """Of the peer at its other end."""
        ...

    def tell(self, message: Complete | Failed) -> None: ...

    def refuse(self, lease: int) -> None:
        """Tells the peer, once, that it writes into a lease it does not have."""
        ...

    def count(self, event: str) -> None: ...


class _Split:
    """A page that comes in parts, by byte range."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ranges: dict[int, int] = {}
        """Lengths by offset of what came or is coming."""
        self.landed = 0

    def overlaps(self, offset: int, length: int) -> bool:
        return any(
            offset < start + size and start < offset + length for start, size in self.ranges.items()
        )


class Lease:
    """One lease and how far it has come. Its fields change under the lock of `Leases` only."""

    def __init__(self, number: int, writer_epoch: int | None, landing: Landing, done: Done) -> None:
        self.number, self.writer_epoch, self.landing, self.done = (
            number,
            writer_epoch,
            landing,
            done,
        )
        self.layers, self.pages, self.open = landing.layers, landing.pages, landing.open
        self.taken = {
            Part.PAGES: bytearray(self.layers * self.pages),
            Part.OPEN: bytearray(self.layers if self.open else 0),
        }
        """For every run, layer by layer, whether it came or is coming."""
        self.missing = sum(map(len, self.taken.values()))
        self.splits: dict[tuple[Part, int], _Split] = {}
        self.writer: Writer | None = None
        self.writing = 0
        self.frames = 0
        self.sent_frames: int | None = None
        """Of the whole transfer, once its sender has said so."""
        self.over = False
        self.problem: str | None = None
        self.settled = False
        self.forgotten: float | None = None
        """When it was."""
        self.left: Callable[[], None] | None = None
        """To be called when nobody writes into it any more."""

    def lets(self, writer: Writer) -> bool:
        """Whether this is the link to write: its peer is meant, and no other has begun. A broken
        one may not begin, for nothing would end what it began."""
        meant = self.writer_epoch is None or self.writer_epoch == writer.epoch
        return meant and not writer.lost and (self.writer is None or self.writer is writer)

    def per_layer(self, part: Part) -> int:
        return self.pages if part is Part.PAGES else 1

    def describe(self) -> str:
        rows = " with open rows" if self.open else ""
        return f"{self.layers} layers of {self.pages} pages{rows}"


class Claim:
    """A frame's run of a lease, while it is written."""

    def __init__(self, lease: Lease, header: Header) -> None:
        self.lease, self.header = lease, header

    def views(self) -> Sequence[memoryview]:
        """The memory for the frame's payload, as bytes.

        Raises `LookupError` where the landing has no such run, or one of another size.
        """
        header, landing = self.header, self.lease.landing
        views: list[memoryview] = []
        size = 0
        for layer in range(header.layer, header.layer + header.layers):
            for view in landing.views(header.part, layer, header.first, header.count):
                if view.readonly:
                    raise LookupError("the receiver's memory for a run cannot be written")
                views.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
                size += view.nbytes
        if size != (header.size or header.length):
            raise LookupError(
                f"the receiver has {size} bytes for a run of {header.size or header.length}"
            )
        return views if not header.size else byte_range(views, header.offset, header.length)

    def landed(self) -> int:
        """The payload is in those views and right. Returns what `Landing.landed` does."""
        header = self.header
        if header.size:
            return 0
        return self.lease.landing.landed(
            header.part, header.layer, header.layers, header.first, header.count
        )


def byte_range(views: Sequence[memoryview], offset: int, length: int) -> list[memoryview]:
    """The bytes `offset : offset + length` of views one after the other."""
    found = []
    for view in views:
        part = view[offset : offset + length]
        if len(part):
            found.append(part)
        length -= len(part)
        offset = max(0, offset - len(view))
    return found


class Leases:
    """All leases of a node; for any thread."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._lock = threading.Lock()
        self._leases: dict[int, Lease] = {}
        self._leaving: set[Lease] = set()
        """Those that were forgotten while somebody wrote into them, and still does."""

    def expect(self, number: int, writer_epoch: int | None, landing: Landing, done: Done) -> None:
        """Opens a lease. Raises `ValueError` where its number is in use."""
        lease = Lease(number, writer_epoch, landing, done)
        with self._lock:
            if number in self._leases:
                raise ValueError(f"lease {number} is in use")
            self._leases[number] = lease
            if not lease.missing:
                self._end(lease, None)

    def forget(self, number: int, left: Callable[[], None]) -> bool:
        """See `Node.forget`."""
        with self._lock:
            lease = self._leases.pop(number, None)
            if lease is None:
                return True
            lease.forgotten = time.monotonic()
            if lease.writer is not None and not lease.settled:
                why = "the receiver has taken its pages back"
                lease.writer.tell(Failed(number, why, unwanted=True))
            if not lease.writing:
                return True
            lease.left = left
            self._leaving.add(lease)
            return False

    def clings(self, writer: Writer) -> bool:
        """Whether a link has been writing into a lease for long since that was forgotten."""
        with self._lock:
            latest = time.monotonic() - _GRACE_SECONDS
            return any(
                lease.writer is writer and lease.forgotten is not None and lease.forgotten < latest
                for lease in self._leaving
            )

    def claim(self, header: Header, writer: Writer) -> Claim | None:
        """The right to write a frame's payload, to be given back by `land`; None where the payload
        is to be dropped, for a reason that has been counted."""
        with self._lock:
            lease = self._leases.get(header.lease)
            if lease is None or lease.over or not lease.lets(writer):
                writer.count("stale")
                if lease is None or not lease.over:
                    writer.refuse(header.lease)
                return None
            lease.writer = writer
            problem = self._take(lease, header, writer)
            if problem is not None:
                if problem:
                    self._end(lease, problem)
                return None
            lease.writing += 1
            return Claim(lease, header)

    def _take(self, lease: Lease, header: Header, writer: Writer) -> str | None:
        """Marks a frame's runs; else why its lease fails, or "" for a mere duplicate."""
        part, per_layer = header.part, lease.per_layer(header.part)
        taken = lease.taken[part]
        if (
            not taken
            or header.layer + header.layers > lease.layers
            or header.first + header.count > per_layer
        ):
            return (
                f"the sender wrote layers from {header.layer} on, {header.layers} of them, pages "
                f"from {header.first} on, {header.count} of them, into {lease.describe()}"
            )
        if header.size:
            return self._take_range(lease, header, writer)
        starts = self._starts(lease, header)
        there = sum(taken.count(1, start, start + header.count) for start in starts)
        if there == header.layers * header.count:
            writer.count("duplicate")
            return ""
        if there:
            return "the sender wrote some pages twice, cut in different ways"
        for start in starts:
            taken[start : start + header.count] = b"\x01" * header.count
        return None

    def _take_range(self, lease: Lease, header: Header, writer: Writer) -> str | None:
        (index,) = self._starts(lease, header)
        split = lease.splits.get((header.part, index))
        if split is None:
            if lease.taken[header.part][index]:
                return "the sender wrote a page whole and in parts"
            split = lease.splits[header.part, index] = _Split(header.size)
            lease.taken[header.part][index] = 1
        if split.ranges.get(header.offset) == header.length and split.size == header.size:
            writer.count("duplicate")
            return ""
        if split.size != header.size or split.overlaps(header.offset, header.length):
            return "the sender wrote parts of a page twice, cut in different ways"
        split.ranges[header.offset] = header.length
        return None

    def _starts(self, lease: Lease, header: Header) -> list[int]:
        per_layer = lease.per_layer(header.part)
        layers = range(header.layer, header.layer + header.layers)
        return [layer * per_layer + header.first for layer in layers]

    def land(self, claim: Claim, problem: str | None) -> bool:
        """Gives a claim back: its payload has been written and is right, unless there is a problem.
        Returns whether its lease wanted it to the end."""
        lease, header = claim.lease, claim.header
        with self._lock:
            lease.writing -= 1
            wanted = not lease.over and lease.forgotten is None
            if problem is not None:
                self._end(lease, problem)
            elif not lease.over:
                lease.frames += 1
                lease.missing -= self._landed(lease, header)
                if not lease.missing:
                    self._end(lease, None)
                else:
                    self._check_sent(lease)
            if not lease.writing:
                self._settle(lease)
                self._leaving.discard(lease)
                if lease.left is not None:
                    self._notifier.put(lease.left)
            return wanted and problem is None

    def _landed(self, lease: Lease, header: Header) -> int:
        """How many runs a frame completes."""
        if not header.size:
            return header.layers * header.count
        (index,) = self._starts(lease, header)
        split = lease.splits[header.part, index]
        split.landed += header.length
        return int(split.landed == split.size)

    def sent(self, number: int, writer: Writer, frames: int) -> None:
        """The sender says that it has sent everything, in so many frames."""
        with self._lock:
            lease = self._leases.get(number)
            if lease is None or not lease.lets(writer):
                writer.refuse(number)
                return
            if lease.over:
                return
            lease.writer = writer
            lease.sent_frames = frames
            self._check_sent(lease)

    def _check_sent(self, lease: Lease) -> None:
        if lease.frames == lease.sent_frames and not lease.writing and not lease.over:
            self._end(
                lease,
                f"the sender wrote all it had; missing runs: {lease.missing} of {lease.describe()}",
            )

    def cancel(self, number: int, writer: Writer) -> None:
        """The sender gives up."""
        with self._lock:
            lease = self._leases.get(number)
            if lease is not None and lease.lets(writer):
                lease.writer = writer
                self._end(lease, "the sender cancelled it", counts=False)

    def lose(self, writer: Writer | None, reason: str) -> None:
        """A link has broken, or every one for None: what it had begun fails."""
        with self._lock:
            if writer is not None:
                writer.lost = True
            for lease in self._leases.values():
                if writer is None or lease.writer is writer:
                    self._end(lease, reason)

    def _end(self, lease: Lease, problem: str | None, *, counts: bool = True) -> None:
        if not lease.over:
            lease.over, lease.problem = True, problem
            if problem is not None and counts and lease.writer is not None:
                lease.writer.count("failed")
        self._settle(lease)

    def _settle(self, lease: Lease) -> None:
        """Tells both sides how a lease ended, when nobody writes into it any more."""
        if not lease.over or lease.writing or lease.settled or lease.forgotten is not None:
            return
        lease.settled = True
        if lease.writer is not None:
            if lease.problem is None:
                lease.writer.tell(Complete(lease.number))
            else:
                lease.writer.tell(Failed(lease.number, lease.problem))
        self._notifier.put(lambda: self._call(lease))

    def _call(self, lease: Lease) -> None:
        with self._lock:
            if lease.forgotten is not None:
                return
        lease.done(lease.problem)
