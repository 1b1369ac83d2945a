"""The receiver's side of a link: its control stream, and frames into the pages of leases."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Sequence

from fourfold.transport.config import MAX_STREAMS, TransportConfig, TransportPath
from fourfold.transport.control import (
    Cancel,
    Complete,
    Control,
    Failed,
    Finish,
    Grant,
    Mapped,
    Offer,
    Ping,
    Pong,
    Region,
    ToReceiver,
    Welcome,
)
from fourfold.transport.frames import (
    EXTENT_BYTES,
    HEADER_BYTES,
    FrameError,
    Header,
    Kind,
    checksum,
    decode_extents,
    decode_header,
)
from fourfold.transport.handshake import Introduction
from fourfold.transport.identity import Identity
from fourfold.transport.leases import Claim, Leases
from fourfold.transport.shared import MappingError, Mappings, copy
from fourfold.transport.stats import SHARED_MEMORY, Counters
from fourfold.transport.wire import Wire

logger = logging.getLogger(__name__)

_DROP_BYTES = 1 << 18
_MAX_REGIONS = 64
_REMEMBERED = 1024
"""Leases whose refusal was told, so that it is told once."""
_GRANTS = 4
"""In how many parts the window is given back: each wakes a thread on both sides."""


class Session:
    """One link as its receiver sees it. Threads: one in `run`, one in `serve` for each stream."""

    def __init__(
        self,
        wire: Wire,
        introduction: Introduction,
        *,
        me: Identity,
        config: TransportConfig,
        leases: Leases,
        counters: Counters,
    ) -> None:
        self.peer = introduction.identity
        self.number = introduction.session
        self.lost = False
        self._me, self._config = me, config
        self._leases, self._counters = leases, counters
        self._wire = wire
        self._lock = threading.Lock()
        self._streams: set[Wire] = set()
        self._left = threading.Condition(self._lock)
        self._closed = ""
        """Why the link has ended."""
        self._refused: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._dealt_with = 0
        self._mappings = Mappings()
        self._control: Control[ToReceiver] = Control(
            wire,
            ToReceiver,
            hear=self._hear,
            beat=lambda: None,
            silence_seconds=config.stall_seconds,
        )

    @property
    def epoch(self) -> int:
        return self.peer.epoch

    def run(self) -> None:
        """Serves the control stream until the link ends, then ends all of it."""
        self._counters.connected = True
        self._counters.add("links")
        self._control.post(Welcome(self._config.window_bytes, self._config.max_payload))
        reason = "its thread failed"
        try:
            reason = self._control.run()
        finally:
            self._finish(reason)

    def serve(self, wire: Wire) -> None:
        """Receives the frames of one stream until it or the link ends."""
        with self._lock:
            if self._closed or len(self._streams) >= MAX_STREAMS:
                wire.shut()
                wire.close()
                return
            self._streams.add(wire)
            if self._counters.path != SHARED_MEMORY:
                self._counters.path = f"tcp x{len(self._streams)}"
        try:
            self._receive(wire)
        except FrameError as error:
            logger.warning("closed the link from %s: a frame is wrong: %s", self._name, error)
            self.close("a frame was wrong")
        except (OSError, EOFError):
            pass  # as below
        finally:
            self.close("a stream of the link ended")
            with self._lock:
                wire.close()
                self._streams.discard(wire)
                self._left.notify_all()

    def tell(self, message: Complete | Failed) -> None:
        """Sends the peer how a transfer ended."""
        self._control.post(message)

    def refuse(self, lease: int) -> None:
        """Tells the peer, once, that there is no such lease for it."""
        with self._lock:
            if lease in self._refused:
                return
            self._refused[lease] = None
            if len(self._refused) > _REMEMBERED:
                self._refused.popitem(last=False)
        self._control.post(Failed(lease, "the receiver has no such lease, or has taken it back"))

    def count(self, event: str) -> None:
        """Counts an event of this peer."""
        self._counters.add(event)

    def close(self, reason: str) -> None:
        """Ends the link, for any thread; what it had begun fails."""
        self._control.end(reason)
        with self._lock:
            self._closed = self._closed or reason
            for wire in self._streams:
                wire.shut()

    @property
    def _name(self) -> str:
        return f"{self.peer.name} ({self._wire.address})"

    def _finish(self, reason: str) -> None:
        self.close(reason)
        self._counters.connected = False
        logger.info("the link from %s ended: %s", self._name, reason)
        self._leases.lose(self, self._why())
        with self._left:
            self._left.wait_for(lambda: not self._streams)
        self._mappings.close()
        self._wire.close()

    def _why(self) -> str:
        return f"the link from {self.peer.name} ended: {self._closed}"

    def _hear(self, message: ToReceiver) -> None:
        match message:
            case Ping(sent):
                self._control.post(Pong(sent))
            case Finish(lease, frames):
                self._leases.sent(lease, self, frames)
            case Cancel(lease):
                self._leases.cancel(lease, self)
            case Offer(regions):
                self._control.post(self._map(regions))

    def _map(self, regions: Sequence[Region]) -> Mapped:
        """Maps the peer's memory, as far as that is allowed and possible."""
        if self._config.path is TransportPath.TCP:
            return Mapped([], f"{self._me.name} was told to take pages over TCP")
        mapped, refusal = [], ""
        for region in regions[:_MAX_REGIONS]:
            try:
                self._mappings.add(region)
                mapped.append(region.number)
            except MappingError as error:
                refusal = str(error)
        if mapped:
            self._counters.path = SHARED_MEMORY
        return Mapped(mapped, refusal)

    def _receive(self, wire: Wire) -> None:
        """Deals with frames until the stream ends. Raises `FrameError`, `OSError`, `EOFError`."""
        head = memoryview(bytearray(HEADER_BYTES))
        while True:
            wire.receive([head])
            header = decode_header(head, self._config.max_payload)
            self._counters.begin()
            right = 0
            try:
                right = self._deal_with(wire, header)
            finally:
                self._counters.end(right)
            self._grant(header.length, flush=header.kind in (Kind.PROBE, Kind.DESCRIBED_PROBE))

    def _deal_with(self, wire: Wire, header: Header) -> int:
        """Receives one payload; returns how many of its bytes somebody wanted and were right."""
        payload = self._payload(wire, header)
        if header.kind in (Kind.PROBE, Kind.DESCRIBED_PROBE):
            payload.fill([memoryview(bytearray(header.length))])
            return 0
        if header.epoch != self._me.epoch:
            self.count("stale")
            self.refuse(header.lease)
            claim = None
        else:
            claim = self._leases.claim(header, self)
        if claim is None:
            payload.drop()
            return 0
        problem: str | None = "its thread failed"
        try:
            try:
                views = claim.views()
            except Exception as error:
                problem = f"the receiver cannot place a run: {error}"
                payload.drop()
            else:
                payload.fill(views)
                problem = self._verify(views, header) or _landed(claim)
        except (OSError, EOFError):
            self.close("a stream ended amid a page")
            problem = self._why()
            raise
        finally:
            wanted = self._leases.land(claim, problem)
        return header.length if wanted else 0

    def _payload(self, wire: Wire, header: Header) -> _Payload:
        """Where a payload comes from. Raises `FrameError` where it can come from nowhere."""
        if not header.extents:
            return _Payload(wire, header.length, [])
        described = memoryview(bytearray(header.extents * EXTENT_BYTES))
        wire.receive([described])
        extents = decode_extents(described, header.length)
        return _Payload(wire, header.length, self._mappings.sources(extents))

    def _verify(self, views: Sequence[memoryview], header: Header) -> str | None:
        if checksum(views) == header.checksum:
            return None
        self.count("corrupt")
        logger.warning(
            "pages from %s arrived altered: lease %d, layer %d, page %d",
            self._name,
            header.lease,
            header.layer,
            header.first,
        )
        return f"a payload of layer {header.layer} arrived altered (its checksum is wrong)"

    def _grant(self, count: int, *, flush: bool) -> None:
        """Gives back what was dealt with, once it is worth a message."""
        with self._lock:
            self._dealt_with += count
            if not flush and self._dealt_with < self._config.window_bytes // _GRANTS:
                return
            count, self._dealt_with = self._dealt_with, 0
        self._control.post(Grant(count))


def _landed(claim: Claim) -> str | None:
    """Has the receiver take a run that is right; why it cannot, or None."""
    try:
        claim.landed()
    except Exception as error:
        return f"the receiver cannot take a run: {error}"
    return None


class _Payload:
    """The bytes that a frame is about: to come on its stream, or in the peer's shared memory."""

    def __init__(self, wire: Wire, length: int, sources: list[tuple[int, int]]) -> None:
        self._wire, self._length, self._sources = wire, length, sources

    def fill(self, views: Sequence[memoryview]) -> None:
        """Puts them into views of as many bytes."""
        if self._sources:
            copy(self._sources, views)
        else:
            self._wire.receive(views)

    def drop(self) -> None:
        """Reads them away, where they come on the stream."""
        length = 0 if self._sources else self._length
        scratch = memoryview(bytearray(min(length, _DROP_BYTES)))
        while length:
            part = scratch[:length]
            self._wire.receive([part])
            length -= len(part)
