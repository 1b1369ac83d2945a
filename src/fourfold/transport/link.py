"""The sender's side: a link to a peer, and transfers into its leases."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from fourfold.errors import FourfoldError
from fourfold.transport.config import TransportConfig
from fourfold.transport.control import (
    Cancel,
    Complete,
    Control,
    Failed,
    Finish,
    Grant,
    Mapped,
    Ping,
    Pong,
    ToSender,
    Welcome,
)
from fourfold.transport.cutting import Cutter, Slice
from fourfold.transport.frames import Header, Kind, checksum, encode_header
from fourfold.transport.handshake import Handshake, Purpose, Role
from fourfold.transport.identity import Identity
from fourfold.transport.notifier import Notifier
from fourfold.transport.peer import Peer
from fourfold.transport.pieces import Piece
from fourfold.transport.stats import Counters
from fourfold.transport.wire import Wire, dial

logger = logging.getLogger(__name__)

Done = Callable[[str | None], None]

_LEAVE_SECONDS = 30.0


class Transfer:
    """Pages on their way into one lease. For one thread; its fields change under the link's lock.

    `done` is called once, from a thread of the transport, unless the transfer is cancelled first.
    """

    def __init__(self, link: Link, lease: int, done: Done) -> None:
        self._link = link
        self.lease, self.done = lease, done
        self.queued = 0
        """Bytes that wait to be sent."""
        self.sending = 0
        """Frames that are being sent now."""
        self.frames = 0
        self.finishing = False
        self.sent = False
        """Whether the receiver was told that this is all."""
        self.over = False
        self.problem: str | None = None
        self.settled = False
        self.cancelled = False

    def write(self, pieces: Sequence[Piece]) -> None:
        """Queues runs, in any order; never waits for the network.

        Their memory must stay as it is until the transfer is done or cancelled. Raises
        `ValueError` for a piece that makes no sense.
        """
        self._link.write(self, pieces)

    def finish(self) -> None:
        """Says that there are no more pieces: `done(None)` follows when the receiver has verified
        everything it expects."""
        self._link.finish(self)

    def cancel(self) -> None:
        """Gives the transfer up: when this returns, no thread of ours reads its pieces, and `done`
        is not called any more."""
        self._link.cancel(self)


class Link:
    """A way to one incarnation of a peer. It connects by itself, and once broken stays broken."""

    def __init__(
        self,
        peer: Peer,
        *,
        identity: Identity,
        config: TransportConfig,
        tls: ssl.SSLContext | None,
        counters: Counters,
        notifier: Notifier,
    ) -> None:
        """`identity` is this node's own."""
        self.peer = peer
        self._identity, self._config, self._tls = identity, config, tls
        self._counters, self._notifier = counters, notifier
        self._work = threading.Condition()
        self._cutter = Cutter(config.slice_bytes)
        self._transfers: dict[int, Transfer] = {}
        self._credit = 0
        self._moved = time.monotonic()
        self._problem: str | None = None
        self._control: Control[ToSender] | None = None
        self._session = os.urandom(16)
        self._streams: list[Wire] = []
        self._senders: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run, name=f"link {peer.name}", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> str | None:
        """Why the link is of no use any more; None while it is, or may become so."""
        return self._problem

    def begin(self, lease: int, done: Done) -> Transfer:
        """A transfer into a lease of the peer; on a broken link it fails at once.

        Raises `ValueError` where one into the same lease is under way.
        """
        transfer = Transfer(self, lease, done)
        with self._work:
            if lease in self._transfers:
                raise ValueError(f"a transfer into lease {lease} is under way")
            self._transfers[lease] = transfer
            if self._problem is not None:
                self._end(transfer, self._problem)
        return transfer

    def write(self, transfer: Transfer, pieces: Sequence[Piece]) -> None:
        """See `Transfer`."""
        with self._work:
            assert not transfer.finishing, "a piece after the last"
            if transfer.over:
                return
            self._start_clock()
            transfer.queued += self._cutter.add(transfer, list(pieces))
            self._work.notify_all()

    def finish(self, transfer: Transfer) -> None:
        """See `Transfer`."""
        with self._work:
            self._start_clock()
            transfer.finishing = True
            self._say_sent(transfer)
            self._settle(transfer)

    def cancel(self, transfer: Transfer) -> None:
        """See `Transfer`."""
        with self._work:
            transfer.cancelled = True
            if not transfer.over:
                self._end(transfer, "it was cancelled")
                if self._control is not None:
                    self._control.post(Cancel(transfer.lease))
            if not self._work.wait_for(lambda: not transfer.sending, _LEAVE_SECONDS):
                raise RuntimeError(f"a thread still reads the pages for lease {transfer.lease}")

    def close(self, reason: str) -> None:
        """Breaks the link: what is under way fails."""
        self._break(reason)

    def join(self, seconds: float) -> None:
        """Waits for the link's threads after `close`."""
        self._thread.join(seconds)

    def _run(self) -> None:
        reason, peer = "its thread failed", self.peer
        try:
            wire = self._dial(Purpose.LINK)
            self._control = Control(
                wire,
                ToSender,
                hear=self._hear,
                beat=self._beat,
                silence_seconds=self._config.stall_seconds,
            )
            if self._problem is not None:
                self._control.end(self._problem)
            try:
                reason = self._control.run()
            finally:
                self._break(reason)
                for sender in self._senders:
                    sender.join()
                for stream in (*self._streams, wire):
                    stream.close()
        except FourfoldError as error:
            logger.warning("no link to %s (%s:%d): %s", peer.name, peer.host, peer.port, error)
            reason = str(error)
        except OSError as error:
            reason = f"it cannot be reached at {peer.host}:{peer.port}: {error}"
        finally:
            self._counters.connected = False
            self._break(reason)

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

    def _open(self) -> None:
        """Opens the streams; from the control thread."""
        try:
            self._open_streams()
        except (OSError, FourfoldError) as error:
            self._break(f"a stream cannot be opened: {error}")

    def _open_streams(self) -> None:
        for index in range(self._config.stream_count):
            wire = self._dial(Purpose.STREAM)
            with self._work:
                if self._problem is not None:
                    wire.close()
                    return
                self._streams.append(wire)
            name = f"link {self.peer.name} stream {index}"
            sender = threading.Thread(target=self._serve, args=(wire,), name=name, daemon=True)
            sender.start()
            self._senders.append(sender)
        self._counters.path = f"tcp x{len(self._streams)}"
        self._counters.connected = True
        self._counters.add("links")

    def _hear(self, message: ToSender) -> None:
        if not isinstance(message, Pong):
            self._moved = time.monotonic()
        match message:
            case Pong(sent):
                self._counters.round_trip = (time.monotonic_ns() - sent) / 1e9
            case Welcome(window):
                with self._work:
                    self._credit += window
                self._open()
            case Mapped():
                pass
            case Grant(count):
                with self._work:
                    self._credit += count
                    self._work.notify_all()
            case Complete(lease):
                self._ended(lease, None)
            case Failed(lease, reason):
                self._ended(lease, reason)

    def _ended(self, lease: int, problem: str | None) -> None:
        with self._work:
            transfer = self._transfers.get(lease)
            if transfer is not None:
                self._end(transfer, problem)

    def _beat(self) -> None:
        """Each second: a heartbeat, and whether anything moves."""
        assert self._control is not None
        self._control.post(Ping(time.monotonic_ns()))
        with self._work:
            stalled = time.monotonic() - self._moved > self._config.stall_seconds
            busy = self._busy()
        if stalled and busy:
            self._control.end(f"nothing has moved for {self._config.stall_seconds:g} s")

    def _start_clock(self) -> None:
        """What is asked for now has until a stall's time from now."""
        if not self._busy():
            self._moved = time.monotonic()

    def _busy(self) -> bool:
        """Whether the peer owes us progress."""
        return bool(self._cutter) or any(
            transfer.sending or transfer.finishing for transfer in self._transfers.values()
        )

    def _serve(self, wire: Wire) -> None:
        """Sends frames on one stream until the link breaks."""
        while (part := self._take()) is not None:
            self._counters.begin()
            sent = 0
            try:
                wire.send([memoryview(self._head(part)), *part.views])
                sent = part.length
            except OSError as error:
                self._break(f"a stream broke: {error.strerror or error}")
            finally:
                self._counters.end(sent)
                self._gave(part)

    def _head(self, part: Slice) -> bytes:
        assert part.transfer is not None
        return encode_header(
            Header(
                kind=Kind.DATA,
                epoch=self.peer.epoch,
                lease=part.transfer.lease,
                part=part.part,
                layer=part.layer,
                layers=part.layers,
                first=part.first,
                count=part.count,
                length=part.length,
                checksum=checksum(part.views),
                offset=part.offset,
                size=part.size,
            )
        )

    def _take(self) -> Slice | None:
        """The next frame, when there is one and credit for it; None when the link is broken."""
        with self._work:
            self._work.wait_for(
                lambda: self._problem is not None or (self._cutter and self._credit > 0)
            )
            if self._problem is not None:
                return None
            part = self._cutter.cut()
            self._credit -= part.length
            if part.transfer is not None:
                part.transfer.queued -= part.length
                part.transfer.sending += 1
            return part

    def _gave(self, part: Slice) -> None:
        """A frame has been sent, or its stream has broken."""
        self._moved = time.monotonic()
        transfer = part.transfer
        if transfer is None:
            return
        with self._work:
            transfer.sending -= 1
            transfer.frames += 1
            if not transfer.sending:
                self._say_sent(transfer)
                self._settle(transfer)
                self._work.notify_all()

    def _say_sent(self, transfer: Transfer) -> None:
        idle = not transfer.queued and not transfer.sending
        if transfer.finishing and idle and not transfer.sent and not transfer.over:
            if self._control is None:
                return
            transfer.sent = True
            self._control.post(Finish(transfer.lease, transfer.frames))

    def _break(self, reason: str) -> None:
        with self._work:
            if self._problem is not None:
                return
            self._problem = f"the link to {self.peer.name} broke: {reason}"
            self._cutter.clear()
            transfers = list(self._transfers.values())
            for stream in self._streams:
                stream.shut()
            for transfer in transfers:
                self._end(transfer, self._problem)
            self._work.notify_all()
            if self._control is not None:
                self._control.end(reason)
        logger.info("the link to %s ended: %s", self.peer.name, reason)

    def _end(self, transfer: Transfer, problem: str | None) -> None:
        if not transfer.over:
            transfer.over, transfer.problem = True, problem
            if transfer.queued:
                self._cutter.drop(transfer)
                transfer.queued = 0
            if problem is not None:
                self._counters.add("failed")
        self._settle(transfer)

    def _settle(self, transfer: Transfer) -> None:
        """Tells how a transfer ended, when no thread of ours reads its pieces any more."""
        if not transfer.over or transfer.sending or transfer.settled:
            return
        if transfer.problem is None and not transfer.finishing:
            return
        transfer.settled = True
        self._transfers.pop(transfer.lease, None)
        self._notifier.put(lambda: self._call(transfer))

    def _call(self, transfer: Transfer) -> None:
        with self._work:
            if transfer.cancelled:
                return
        transfer.done(transfer.problem)
