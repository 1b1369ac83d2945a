"""The sender's side of a link: how it connects, which way pages go, and how it ends.

A link has `stand_seconds` to come to stand, from its first connection to the end of its test, or
longer while that moves; only then does the clock of its transfers run, which gives up what has not
moved for `stall_seconds`.
Its control thread waits for nobody, so that heartbeats are sent, and missed, in every phase.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from fourfold.errors import FourfoldError
from fourfold.transport.config import TransportConfig, TransportPath
from fourfold.transport.control import (
    Cancel,
    Complete,
    Control,
    Failed,
    Finish,
    Grant,
    Joined,
    Mapped,
    Ping,
    Pong,
    ToSender,
    Welcome,
)
from fourfold.transport.cutting import Slice
from fourfold.transport.frames import (
    Extent,
    Fields,
    Header,
    Kind,
    encode_extents,
    encode_header,
)
from fourfold.transport.handshake import Handshake, Purpose, Role
from fourfold.transport.identity import Identity
from fourfold.transport.memory import Staging, places_of
from fourfold.transport.notifier import Notifier
from fourfold.transport.peer import Peer
from fourfold.transport.pieces import Part
from fourfold.transport.rdma import Exposure
from fourfold.transport.self_test import PROBE_ROUND_TRIPS, Probe, RoundTrips
from fourfold.transport.shared import Regions
from fourfold.transport.stats import DEVICE_MEMORY, Counters
from fourfold.transport.tls import Tls
from fourfold.transport.transfers import Done, Transfer, Transfers
from fourfold.transport.ways import Ways
from fourfold.transport.wire import Wire, dial

__all__ = ["Link", "Transfer"]

logger = logging.getLogger(__name__)

_FAST = 1e9
"""Bytes a second."""


class Link:
    """A way to one incarnation of a peer. It connects by itself, and once broken stays broken.

    When it stands it tests itself, and only then sends.
    """

    def __init__(
        self,
        peer: Peer,
        *,
        identity: Identity,
        config: TransportConfig,
        tls: Tls | None,
        regions: Regions,
        exposure: Exposure | None,
        counters: Counters,
        notifier: Notifier,
    ) -> None:
        """`identity`, `regions` and `exposure` are this node's own."""
        self.peer = peer
        self._identity, self._config, self._tls = identity, config, tls
        self._regions, self._counters = regions, counters
        self._ways = Ways(config, peer, regions, exposure)
        self._transfers = Transfers(config.slice_bytes, counters, notifier, self._tell)
        self._control: Control[ToSender] | None = None
        self._session = os.urandom(16)
        self._lock = threading.Lock()
        self._streams: list[Wire] = []
        self._stream_threads: list[threading.Thread] = []
        """One that opens the streams, then one that sends on each; the control thread's to start
        and to wait for."""
        self._opened = False
        self._stood = False
        self._window = self._max_payload = 0
        self._slice_bytes = config.slice_bytes
        self._round_trips: RoundTrips | None = None
        self._probe: Probe | None = None
        self._deadline = time.monotonic() + config.stand_seconds
        """For it to stand, or longer while its test moves; none once it does."""
        self._acknowledged, self._arrived = 0, -math.inf
        """Bytes of the streams that the peer's system has, and since when it has so many."""
        self._thread = threading.Thread(target=self._run, name=f"link {peer.name}", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> str | None:
        """Why the link is of no use any more; None while it is, or may become so."""
        return self._transfers.problem

    def begin(self, lease: int, done: Done, pulled: Mapping[Part, int] | None = None) -> Transfer:
        """A transfer into a lease of the peer; on a broken link it fails at once.

        `pulled`: where pieces only say which pages the receiver is to copy, the bytes of one page
        in one layer, and of the open rows.

        Raises `ValueError` where one into the same lease is under way, or the number is no lease.
        """
        return self._transfers.begin(lease, done, pulled)

    def round_trips(self, count: int, seconds: float) -> list[float]:
        """Seconds that so many messages took there and back, one after the other; for a link that
        stands. Raises `queue.Empty` after `seconds`."""
        times: queue.SimpleQueue[list[float]] = queue.SimpleQueue()
        assert self._control is not None, "the link does not stand yet"
        self._ping(RoundTrips(count, times.put))
        return times.get(timeout=seconds)

    def offer(self) -> bool:
        """Tells the peer of this node's regions as they are now, if it may read them; whether it
        was told."""
        offer = self._ways.offer() if self._control is not None else None
        if self._control is not None and offer is not None:
            self._control.post(offer)
        return offer is not None

    def close(self, reason: str) -> None:
        """Breaks the link: what is under way fails."""
        self._break(reason)

    def join(self, seconds: float) -> None:
        """Waits for the link's threads after `close`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        peer, reason = self.peer, "its thread failed"
        try:
            wire = self._dial(Purpose.LINK)
            control = Control[ToSender](
                wire,
                ToSender,
                hear=self._hear,
                beat=self._beat,
                silence_seconds=self._config.stall_seconds,
            )
            with self._lock:
                self._control = control
                if self.broken is not None:
                    control.end(self.broken)
            try:
                reason = control.run()
            finally:
                self._break(reason)
                for thread in self._stream_threads:
                    thread.join()
                for stream in (*self._streams, wire):
                    stream.close()
        except FourfoldError as error:
            logger.warning("no link to %s (%s:%d): %s", peer.name, peer.host, peer.port, error)
            reason = str(error)
        except OSError as error:
            reason = f"it cannot be reached at {peer.host}:{peer.port}: {error}"
        finally:
            self._break(reason)
            if self._stood:
                self._counters.broke()

    def _dial(self, purpose: Purpose) -> Wire:
        handshake = Handshake(
            Role.DIALLER,
            self._identity,
            self._config.key,
            purpose=purpose,
            session=self._session,
        )
        peer, seconds = self.peer, self._config.connect_seconds
        wire, introduction = dial(peer.host, peer.port, handshake, seconds, self._tls)
        theirs = introduction.identity
        if (theirs.name, theirs.epoch) != (peer.name, peer.epoch):
            wire.close()
            raise ConnectionError(
                f"{theirs.name} with epoch {theirs.epoch} answers instead of epoch {peer.epoch}"
            )
        wire.give_up_after(self._config.stall_seconds)
        return wire

    def _break(self, reason: str) -> None:
        with self._lock:
            if not self._transfers.stop(f"the link to {self.peer.name} broke: {reason}"):
                return
            for stream in self._streams:
                stream.shut()
            if self._control is not None:
                self._control.end(reason)
        logger.info("the link to %s ended: %s", self.peer.name, reason)

    def _tell(self, message: Finish | Cancel) -> None:
        assert self._control is not None, "nothing is sent before the link stands"
        self._control.post(message)

    def _beat(self) -> None:
        """Each second: a heartbeat, and whether it has come to stand and anything moves."""
        assert self._control is not None
        self._control.post(Ping(time.monotonic_ns()))
        seconds = self._config.stall_seconds
        now = time.monotonic()
        acknowledged = sum(stream.acknowledged for stream in self._streams)
        if acknowledged != self._acknowledged:
            self._acknowledged, self._arrived = acknowledged, now
        if now > self._deadline and now - self._arrived > seconds:
            self._control.end(f"it did not come to stand within {self._config.stand_seconds:g} s")
        elif self._transfers.stalled(seconds, self._arrived):
            self._control.end(f"nothing has moved for {seconds:g} s")
        elif self._transfers.clings():
            self._control.end("a stream stood still amid pages of a transfer that was cancelled")

    def _hear(self, message: ToSender) -> None:
        assert self._control is not None
        match message:
            case Pong(sent):
                self._counters.round_trip = (time.monotonic_ns() - sent) / 1e9
                if self._round_trips and (again := self._round_trips.returned(sent)):
                    self._control.post(again)
            case Welcome(window, max_payload):
                if self._window:
                    self._control.end("it was welcomed twice")
                    return
                self._window = window
                self._slice_bytes = min(self._slice_bytes, max_payload)
                self._max_payload = max_payload
                self._choose()
            case Mapped(regions, refusal):
                self._answered(TransportPath.SHARED_MEMORY, regions, refusal)
            case Joined(regions, refusal):
                self._answered(TransportPath.RDMA, regions, refusal)
            case Grant(count):
                self._granted(count)
            case Complete(lease):
                self._transfers.ended(lease, None)
            case Failed(lease, reason, unwanted):
                self._transfers.ended(lease, reason, counts=not unwanted)

    def _choose(self) -> None:
        """Which way pages will go: the best that the peer has not refused."""
        if self.offer():
            return  # and wait for its answer
        why_not = self._ways.settle()
        if why_not is None:
            self._open()
        else:
            self._break(why_not)

    def _answered(self, way: TransportPath, regions: list[int], refusal: str) -> None:
        """The peer reads what it can of this node's memory."""
        self._ways.answered(way, regions, refusal)
        if self._opened:
            self._counters.expect(self._path())
        elif self._ways.readable:
            self._open()
        else:
            self._choose()

    def _path(self) -> str:
        return self._ways.describe(len(self._streams))

    def _open(self) -> None:
        """Has the streams opened, which may take longer than a peer may hear no heartbeat."""
        self._opened = True
        self._start_thread("streams", self._open_streams)

    def _start_thread(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(
            target=target, args=arguments, name=f"link {self.peer.name} {name}", daemon=True
        )
        thread.start()
        self._stream_threads.append(thread)

    def _open_streams(self) -> None:
        """Opens the streams, one by one lest a peer of many meets too many strangers at once, and
        begins the test of the link."""
        try:
            for _ in range(self._config.stream_count):
                wire = self._dial(Purpose.STREAM)
                with self._lock:
                    if self.broken is not None:
                        wire.close()
                        return
                    self._streams.append(wire)
        except (OSError, FourfoldError) as error:
            self._break(f"a stream cannot be opened: {error}")
            return
        except Exception as error:
            self._break(f"a stream failed: {error!r}")
            raise
        self._counters.expect(self._path())
        self._counters.stands()
        self._stood = True
        self._ping(RoundTrips(PROBE_ROUND_TRIPS, self._start_probe))

    def _ping(self, series: RoundTrips) -> None:
        assert self._control is not None
        self._round_trips = series
        self._control.post(series.next())

    def _start_probe(self, round_trips: list[float]) -> None:
        """The second half of the test: payloads on all streams, which then stay open."""
        payload, extents = memoryview(bytes(self._slice_bytes)), []
        if readable := self._ways.readable:
            number = max(readable, key=lambda number: self._regions[number].size)
            payload = self._regions[number].buffer[: self._slice_bytes]
            extents = [Extent(region=number, length=len(payload), offset=0)]
        self._probe = Probe(
            payload=payload,
            extents=extents,
            streams=len(self._streams),
            round_trip=statistics.median(round_trips),
        )
        for index, wire in enumerate(self._streams):
            self._start_thread(f"stream {index}", self._serve, index, wire, self._probe)

    def _granted(self, count: int) -> None:
        probe = self._probe
        if probe is None:
            self._transfers.grant(count)
            return
        probe.granted += count
        if probe.granted < probe.bytes:
            return
        self._probe = None
        rate = probe.bytes / (time.perf_counter() - probe.start)
        self._counters.tested, self._counters.tested_path = rate, self._path()
        logger.info(
            "linked to %s (%s:%d) over %s: %.2f GB/s in a test, a message there and back %.0f us",
            self.peer.name,
            self.peer.host,
            self.peer.port,
            self._path(),
            rate / 1e9,
            1e6 * probe.round_trip,
        )
        slice_bytes = self._slice_bytes
        if rate > _FAST:
            slice_bytes = min(2 * slice_bytes, self._max_payload)
        streams = len(self._streams) if self._ways.readable else 0
        self._deadline = math.inf
        self._transfers.open(self._window, slice_bytes, streams)

    def _serve(self, index: int, wire: Wire, probe: Probe) -> None:
        """Sends frames on one stream until the link breaks."""
        try:
            for _ in range(probe.frames):
                wire.send(probe.frame(self.peer.epoch))
            staging = Staging(self._config.stream_count)
            while (part := self._transfers.take(index)) is not None:
                self._send(wire, part, staging)
        except OSError as error:
            self._break(f"a stream broke: {error.strerror or error}")
        except Exception as error:
            # Others would wait for this stream's turn.
            self._break(f"a stream failed: {error!r}")
            raise

    def _send(self, wire: Wire, part: Slice[Transfer], staging: Staging) -> None:
        self._counters.begin()
        moved, path = 0, ""
        try:
            readable = self._ways.readable
            places = places_of(part.views) if readable else None
            extents = self._regions.find(places, readable) if places else None
            pieces: Sequence[memoryview] = ()
            # Right before it is sent, so that it is read from memory once.
            if extents and places:
                digest = staging.checksum(part.views, places)
            else:
                pieces, digest = staging.collect(part.views)
            wire.send([memoryview(self._head(part, digest, extents or ())), *pieces])
            if (pulled := part.transfer.pulled) is not None:
                moved, path = part.layers * part.count * pulled[part.part], DEVICE_MEMORY
            else:
                moved = part.length
                path = self._ways.describe(len(self._streams), sent=not extents)
        finally:
            self._counters.end(moved, path)
            self._transfers.gave(part)

    def _head(self, part: Slice[Transfer], digest: int, extents: Sequence[Fields]) -> bytes:
        """What goes before a payload of this checksum, or describes it by extents."""
        header = encode_header(
            Header(
                kind=Kind.DESCRIBED if extents else Kind.DATA,
                epoch=self.peer.epoch,
                lease=part.transfer.lease,
                part=part.part,
                layer=part.layer,
                layers=part.layers,
                first=part.first,
                count=part.count,
                length=part.length,
                checksum=digest,
                offset=part.offset,
                size=part.size,
                extents=len(extents),
            )
        )
        return header + encode_extents(extents)
