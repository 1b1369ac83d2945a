"""The receiver's side of a link: its control stream, and frames into the pages of leases."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Sequence

from fourfold.transport.config import MAX_STREAMS, TransportConfig
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
    ToReceiver,
    Welcome,
)
from fourfold.transport.frames import (
    HEADER_BYTES,
    FrameError,
    Header,
    Kind,
    checksum,
    decode_header,
)
from fourfold.transport.handshake import Introduction
from fourfold.transport.leases import Leases
from fourfold.transport.stats import Counters
from fourfold.transport.wire import Wire

logger = logging.getLogger(__name__)

_DROP_BYTES = 1 << 18
_REMEMBERED = 1024
"""Leases whose refusal was told, so that it is told once."""
_GRANTS = 16
"""In how many parts the window is given back."""


class Session:
    """One link as its receiver sees it. Threads: one in `run`, one in `serve` for each stream."""

    def __init__(
        self,
        wire: Wire,
        introduction: Introduction,
        *,
        epoch: int,
        config: TransportConfig,
        leases: Leases,
        counters: Counters,
    ) -> None:
        """`epoch` is this node's own."""
        self.peer = introduction.identity
        self.number = introduction.session
        self._my_epoch, self._config = epoch, config
        self._leases, self._counters = leases, counters
        self._wire = wire
        self._lock = threading.Lock()
        self._streams: set[Wire] = set()
        self._left = threading.Condition(self._lock)
        self._closed = False
        self._refused: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._dealt_with = 0
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
        self._control.post(Welcome(self._config.window_bytes))
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
        try:
            self._receive(wire)
        except FrameError as error:
            logger.warning("closed the link from %s: a frame is wrong: %s", self._name, error)
            self.close("a frame was wrong")
        except (OSError, EOFError):
            self.close("a stream of the link ended")
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
            self._closed = True
            for wire in self._streams:
                wire.shut()

    @property
    def _name(self) -> str:
        return f"{self.peer.name} ({self._wire.address})"

    def _finish(self, reason: str) -> None:
        self.close(reason)
        self._counters.connected = False
        logger.info("the link from %s ended: %s", self._name, reason)
        self._leases.lose(self, f"the link from {self.peer.name} ended: {reason}")
        with self._left:
            self._left.wait_for(lambda: not self._streams)
        self._wire.close()

    def _hear(self, message: ToReceiver) -> None:
        match message:
            case Ping(sent):
                self._control.post(Pong(sent))
            case Finish(lease, frames):
                self._leases.sent(lease, self, frames)
            case Cancel(lease):
                self._leases.cancel(lease, self)
            case Offer():
                self._control.post(Mapped([], "not yet"))

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
        if header.kind is Kind.PROBE:
            self._drop(wire, header.length)
            return 0
        if header.epoch != self._my_epoch:
            self.count("stale")
            self.refuse(header.lease)
            claim = None
        else:
            claim = self._leases.claim(header, self)
        if claim is None:
            self._drop(wire, header.length)
            return 0
        problem: str | None = "the link broke amid a page"
        try:
            try:
                views = claim.views()
            except Exception as error:
                problem = f"the receiver cannot place a run: {error}"
                self._drop(wire, header.length)
            else:
                wire.receive(views)
                problem = self._verify(views, header)
        finally:
            wanted = self._leases.land(claim, problem)
        return header.length if wanted else 0

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

    def _drop(self, wire: Wire, length: int) -> None:
        """Reads a payload that nobody wants."""
        scratch = memoryview(bytearray(min(length, _DROP_BYTES)))
        while length:
            part = scratch[:length]
            wire.receive([part])
            length -= len(part)

    def _grant(self, count: int, *, flush: bool) -> None:
        """Gives back what was dealt with, once it is worth a message."""
        with self._lock:
            self._dealt_with += count
            if not flush and self._dealt_with < self._config.window_bytes // _GRANTS:
                return
            count, self._dealt_with = self._dealt_with, 0
        self._control.post(Grant(count))
