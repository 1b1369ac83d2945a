"""The receiver's side of a link: its control stream, and frames into the pages of leases."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from fourfold.errors import ConfigError
from fourfold.transport.config import MAX_STREAMS, TransportConfig, TransportPath
from fourfold.transport.control import (
    Cancel,
    Complete,
    Control,
    Exposed,
    Failed,
    Finish,
    Grant,
    Joined,
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
from fourfold.transport.memory import Staging
from fourfold.transport.rdma import ExposeError, RemoteMemory
from fourfold.transport.shared import MappingError, Mappings
from fourfold.transport.sources import Fill, ReadError, Source
from fourfold.transport.stats import DEVICE_MEMORY, Counters, tcp
from fourfold.transport.wire import Wire

logger = logging.getLogger(__name__)

_DROP_BYTES = 1 << 18
_MAX_REGIONS = 64
_REMEMBERED = 1024
"""Leases whose refusal was told, so that it is told once."""
_MAX_OFFERS = 64
"""Of one peer's memory for RDMA, each of which takes a while."""
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
        rdma: bool,
    ) -> None:
        """`rdma`: whether this node may read the peer's memory so."""
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
        self._rdma = rdma
        self._memory: Source | None = None
        """Of the peer, once it may be read."""
        # The control stream must not wait for NIXL, which may take seconds to begin.
        self._joining = ThreadPoolExecutor(1, f"{me.name} joins {self.peer.name}")
        self._offers = 0
        self._control: Control[ToReceiver] = Control(
            wire,
            ToReceiver,
            hear=self._hear,
            beat=self._beat,
            silence_seconds=config.stall_seconds,
        )

    @property
    def epoch(self) -> int:
        return self.peer.epoch

    def run(self) -> None:
        """Serves the control stream until the link ends, then ends all of it."""
        self._counters.stands()
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
            if self._memory is None:
                self._counters.expect(tcp(len(self._streams)))
        try:
            self._receive(wire)
        except FrameError as error:
            logger.warning("closed the link from %s: a frame is wrong: %s", self._name, error)
            self.close("a frame was wrong")
        except ReadError as error:
            logger.warning("closed the link from %s: %s", self._name, error)
            self.close(str(error))
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
        why = "the receiver has no such lease, or has taken it back"
        self._control.post(Failed(lease, why, unwanted=True))

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
        self._counters.broke()
        logger.info("the link from %s ended: %s", self._name, reason)
        self._leases.lose(self, self._why())
        with self._left:
            self._left.wait_for(lambda: not self._streams)
        self._joining.shutdown(cancel_futures=True)
        if self._memory is not None:
            self._memory.close()
        self._wire.close()

    def _why(self) -> str:
        return f"the link from {self.peer.name} ended: {self._closed}"

    def _beat(self) -> None:
        if self._leases.clings(self):
            self._control.end("it stood still amid pages that were taken back")

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
            case Exposed():
                self._offers += 1
                if self._offers > _MAX_OFFERS:
                    self._control.end("it offered its memory too often")
                    return
                self._joining.submit(self._try_to_join, message)

    def _map(self, regions: Sequence[Region]) -> Mapped:
        """Maps the peer's memory, as far as that is allowed and possible."""
        if self._config.path is TransportPath.TCP:
            return Mapped([], f"{self._me.name} was told to take pages over TCP")
        memory = Mappings() if self._memory is None else self._memory
        if not isinstance(memory, Mappings):
            return Mapped([], f"{self._me.name} reads this memory over RDMA already")
        mapped, refusal = [], ""
        for region in regions[:_MAX_REGIONS]:
            try:
                memory.add(region)
                mapped.append(region.number)
            except MappingError as error:
                refusal = str(error)
        if mapped:
            self._memory = memory
            self._counters.expect(memory.path)
        return Mapped(mapped, refusal)

    def _try_to_join(self, exposed: Exposed) -> None:
        try:
            self._control.post(self._join(exposed))
        except Exception:
            logger.exception("the memory of %s could not be joined", self._name)
            self.close("its memory could not be joined")

    def _join(self, exposed: Exposed) -> Joined:
        """Makes the peer's memory readable over RDMA, as far as that is allowed and possible."""
        memory, mine = self._memory, self._me.name
        try:
            if not self._rdma:
                return Joined([], f"{mine} was not started with --transport rdma")
            if memory is None:
                memory = RemoteMemory(
                    f"{mine} {self.number.hex()}",
                    self._config.host,
                    max_payload=self._config.max_payload,
                    seconds=self._config.stall_seconds,
                    ended=lambda: bool(self._closed),
                )
            if not isinstance(memory, RemoteMemory):
                return Joined([], f"{mine} has mapped this memory already")
            joined = memory.add(exposed)
        except (ConfigError, ExposeError) as error:
            if isinstance(memory, RemoteMemory) and memory is not self._memory:
                memory.close()
            return Joined([], f"{mine} cannot read its memory: {error}")
        self._memory = memory
        self._counters.expect(memory.path)
        return Joined(joined, "")

    def _receive(self, wire: Wire) -> None:
        """Deals with frames until the stream ends. Raises `FrameError`, `OSError`, `EOFError`."""
        head = memoryview(bytearray(HEADER_BYTES))
        staging = Staging(self._config.stream_count)
        while True:
            wire.receive([head], ahead=self._memory is not None)
            header = decode_header(head, self._config.max_payload)
            self._counters.begin()
            right, path = 0, ""
            try:
                right, path = self._deal_with(wire, header, staging)
            finally:
                self._counters.end(right, path)
            self._grant(header.length, flush=header.kind in (Kind.PROBE, Kind.DESCRIBED_PROBE))

    def _deal_with(self, wire: Wire, header: Header, staging: Staging) -> tuple[int, str]:
        """Receives one payload; returns how many bytes of pages came by it that somebody wanted and
        were right, and which way they took."""
        payload = self._payload(wire, header)
        if header.kind in (Kind.PROBE, Kind.DESCRIBED_PROBE):
            payload.fill([staging.room(header.length)], staging)
            return 0, ""
        if header.epoch != self._me.epoch:
            self.count("stale")
            self.refuse(header.lease)
            claim = None
        else:
            claim = self._leases.claim(header, self)
        if claim is None:
            payload.drop()
            return 0, ""
        problem: str | None = "its thread failed"
        pulled = 0
        try:
            try:
                views = claim.views()
            except Exception as error:
                problem = f"the receiver cannot place a run: {error}"
                payload.drop()
            else:
                problem = self._verify(payload.fill(views, staging), header)
                if problem is None:
                    staging.deliver()
                    pulled, problem = _landed(claim)
        except (OSError, EOFError) as error:
            reads = isinstance(error, ReadError)
            self.close(str(error) if reads else "a stream ended amid a page")
            problem = self._why()
            raise
        finally:
            wanted = self._leases.land(claim, problem)
        if not wanted:
            return 0, ""
        return (pulled, DEVICE_MEMORY) if pulled else (header.length, payload.path)

    def _payload(self, wire: Wire, header: Header) -> _Payload:
        """Where a payload comes from. Raises `FrameError` where it can come from nowhere."""
        if not header.extents:
            return _Payload(wire, header.length, None, tcp(len(self._streams)))
        described = memoryview(bytearray(header.extents * EXTENT_BYTES))
        wire.receive([described])
        extents = decode_extents(described, header.length)
        if self._memory is None:
            raise FrameError("it describes pages, and no memory of its sender can be read here")
        return _Payload(wire, header.length, self._memory.find(extents), self._memory.path)

    def _verify(self, digest: int, header: Header) -> str | None:
        if digest == header.checksum:
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


def _landed(claim: Claim) -> tuple[int, str | None]:
    """Has the receiver take a run that is right: the bytes that it pulled for it, and why it cannot
    take it, or None."""
    try:
        return claim.landed(), None
    except Exception as error:
        return 0, f"the receiver cannot take a run: {error}"


class _Payload:
    """The bytes that a frame is about: to come on its stream, or in memory of the peer."""

    def __init__(self, wire: Wire, length: int, described: Fill | None, path: str) -> None:
        self._wire, self._length, self._described = wire, length, described
        self.path = path

    def fill(self, views: Sequence[memoryview], staging: Staging) -> int:
        """Puts them into views of as many bytes, or where `staging` delivers them from; returns
        their checksum."""
        if self._described is not None:
            return self._described(views, staging)
        target = staging.target(views)
        self._wire.receive(target)
        return checksum(target)

    def drop(self) -> None:
        """Reads them away, where they come on the stream."""
        length = 0 if self._described is not None else self._length
        scratch = memoryview(bytearray(min(length, _DROP_BYTES)))
        while length:
            part = scratch[:length]
            self._wire.receive([part])
            length -= len(part)
