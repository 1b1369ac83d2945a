"""What a link is tested with when it stands: messages there and back, then payloads of no use."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from fourfold.transport.control import Ping
from fourfold.transport.frames import Extent, Header, Kind, checksum, encode_extents, encode_header
from fourfold.transport.pieces import Part

PROBE_FRAMES = 32
PROBE_ROUND_TRIPS = 16


class RoundTrips:
    """A series of messages, each sent when the one before has come back."""

    def __init__(self, count: int, done: Callable[[list[float]], None]) -> None:
        """`done` gets the seconds that each took."""
        self._count, self._done = count, done
        self._seconds: list[float] = []
        self._sent = 0

    def next(self) -> Ping:
        """The next message; it is to be sent at once."""
        self._sent = time.monotonic_ns()
        return Ping(self._sent)

    def returned(self, sent: int) -> Ping | None:
        """An answer came; the message to send for it, if it was ours and not the last."""
        if not self._sent or sent != self._sent:
            return None
        self._seconds.append((time.monotonic_ns() - sent) / 1e9)
        if len(self._seconds) < self._count:
            return self.next()
        self._sent = 0
        self._done(self._seconds)
        return None


@dataclasses.dataclass(kw_only=True)
class Probe:
    """Payloads that the receiver throws away: as many frames on each of some streams."""

    payload: memoryview
    extents: list[Extent]
    """Where the payload lies in memory that the receiver reads; empty for one that is sent."""
    streams: int
    round_trip: float
    """Median seconds of a message there and back, found before."""
    granted: int = 0
    """Bytes that the receiver has dealt with."""
    start: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def frames(self) -> int:
        """On each stream."""
        return max(1, PROBE_FRAMES // self.streams)

    @property
    def bytes(self) -> int:
        """On all streams."""
        return self.frames * len(self.payload) * self.streams

    def frame(self, epoch: int) -> list[memoryview]:
        """One frame as it is sent."""
        header = Header(
            kind=Kind.DESCRIBED_PROBE if self.extents else Kind.PROBE,
            epoch=epoch,
            lease=0,
            part=Part.PAGES,
            layer=0,
            layers=1,
            first=0,
            count=1,
            length=len(self.payload),
            checksum=checksum([self.payload]),
            extents=len(self.extents),
        )
        if self.extents:
            return [memoryview(encode_header(header) + encode_extents(self.extents))]
        return [memoryview(encode_header(header)), self.payload]
