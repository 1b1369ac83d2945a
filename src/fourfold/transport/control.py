"""The control stream of a link: small typed messages, heartbeats, and who has fallen silent.

A message is msgpack behind its length and checksums. One thread does all reading and writing, so
nobody else ever waits for the peer.
"""

from __future__ import annotations

import collections
import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from fourfold.transport.envelope import MessageError, enclose, opened
from fourfold.transport.wire import Wire

_READ_BYTES = 1 << 16
_MAX_MESSAGE = 1 << 16
_MAX_UNSENT = 4 << 20
"""Bytes for a peer that reads nothing, until it is given up."""
_BEAT_SECONDS = 1.0


class Ping(msgspec.Struct, frozen=True, tag=True):
    """A heartbeat, 64 bytes on the wire; its sender's clock in nanoseconds."""

    sent: int
    padding: bytes = bytes(17)


class Pong(msgspec.Struct, frozen=True, tag=True):
    """The answer to a heartbeat, with the clock it came with."""

    sent: int
    padding: bytes = bytes(17)


class Region(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of shared memory, as its owner offers it."""

    number: int
    process: int
    descriptor: int
    inode: int
    size: int


class Offer(msgspec.Struct, frozen=True, tag=True):
    """Memory of the sender that the receiver may map."""

    regions: list[Region]


class ExposedRegion(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of memory that may be read over RDMA, by its address at the owner."""

    number: int
    address: int
    size: int


class Exposed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Memory of the sender that the receiver may read over RDMA."""

    agent: bytes
    """What NIXL needs to know of the sender's agent, and of all these regions."""
    checksum: int
    """xxh3_64 of that."""
    regions: list[ExposedRegion]


class Finish(msgspec.Struct, frozen=True, tag=True):
    """All of a transfer has been sent, in so many frames."""

    lease: int
    frames: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """The sender gives a transfer up."""

    lease: int


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The first message of a receiver: how many bytes may be under way, and be in one frame."""

    window: int
    max_payload: int


class Mapped(msgspec.Struct, frozen=True, tag=True):
    """Which of the offered regions the receiver could map, and why not the others."""

    regions: list[int]
    refusal: str


class Joined(msgspec.Struct, frozen=True, tag=True):
    """Which of the exposed regions the receiver can read, or why it can read none."""

    regions: list[int]
    refusal: str


class Grant(msgspec.Struct, frozen=True, tag=True):
    """So many more bytes may be sent, because as many were dealt with."""

    bytes: int


class Complete(msgspec.Struct, frozen=True, tag=True):
    """A transfer has arrived and everything in it is right."""

    lease: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A transfer is over, and why."""

    lease: int
    reason: str
    unwanted: bool = False
    """Nothing went wrong: the receiver does not want it, or not any more."""


ToReceiver = Ping | Offer | Exposed | Finish | Cancel
ToSender = Pong | Welcome | Mapped | Joined | Grant | Complete | Failed

Incoming = TypeVar("Incoming")


class Control(Generic[Incoming]):
    """One end of a control stream, which hears messages of the type `incoming` (a union)."""

    def __init__(
        self,
        wire: Wire,
        incoming: Any,
        *,
        hear: Callable[[Incoming], None],
        beat: Callable[[], None],
        silence_seconds: float,
    ) -> None:
        """`hear` and `beat`, each second, are called from the thread that is in `run`."""
        self._wire, self._hear, self._beat = wire, hear, beat
        self._silence_seconds = silence_seconds
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._lock = threading.Lock()
        self._posted: collections.deque[bytes] = collections.deque()
        self._unsent, self._arrived = bytearray(), bytearray()
        self._woken = False
        self._end: str | None = None
        self._thread = 0
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        wire.block(False)

    def post(self, message: ToReceiver | ToSender) -> None:
        """Sends a message soon; for any thread, never waits."""
        data = encode(message)
        with self._lock:
            self._posted.append(data)
        self._wake()

    def end(self, reason: str) -> None:
        """Makes `run` return `reason` soon, unless it ends for another."""
        with self._lock:
            self._end = self._end or reason
        self._wake()

    def run(self) -> str:
        """Reads and writes until the stream ends; returns why."""
        self._thread = threading.get_ident()
        try:
            reason = self._run()
            return self._end or reason
        finally:
            self._wire.shut()
            with self._lock:
                self._woken = True  # nobody writes to a closed socket
                self._wake_reader.close()
                self._wake_writer.close()

    def _run(self) -> str:
        poller = select.poll()
        poller.register(self._wake_reader, select.POLLIN)
        interval = min(_BEAT_SECONDS, self._silence_seconds / 3)
        heard = time.monotonic()
        next_beat = heard
        while True:
            now = time.monotonic()
            if now >= next_beat:
                self._beat()
                next_beat = now + interval
            if (end := self._send()) is not None:
                return end
            wanted = select.POLLIN | (select.POLLOUT if self._unsent else 0)
            poller.register(self._wire.fileno(), wanted)
            wait = 0.0 if self._wire.pending else max(0.0, next_beat - now)
            poller.poll(1000 * wait)
            self._sleep_again()
            try:
                if self._receive():
                    heard = time.monotonic()
                # After a read that found nothing: not after this thread itself came too late.
                elif time.monotonic() - heard > self._silence_seconds:
                    return f"it has been silent for {self._silence_seconds:g} s"
            except EOFError:
                return "the other side closed the link"
            except OSError as error:
                return f"the link broke: {error.strerror or error}"
            except (msgspec.DecodeError, MessageError) as error:
                return f"a control message cannot be read: {error}"

    def _send(self) -> str | None:
        """Writes what there is room for; returns why to end, if there is a reason."""
        with self._lock:
            self._unsent += b"".join(self._posted)
            self._posted.clear()
            end = self._end
        if self._unsent:
            try:
                del self._unsent[: self._wire.send_some(self._unsent)]
            except OSError as error:
                return f"the link broke: {error.strerror or error}"
        if len(self._unsent) > _MAX_UNSENT:
            return "the other side reads no messages"
        return end

    def _receive(self) -> bool:
        """Hears every whole message that has arrived; whether anything did."""
        data = self._wire.receive_some(_READ_BYTES)
        if data is None:
            return False
        self._arrived += data
        start = 0
        with memoryview(self._arrived) as view:
            while (found := opened(view, start, _MAX_MESSAGE)) is not None:
                body, start = found
                self._hear(self._decoder.decode(body))
                body.release()
        del self._arrived[:start]
        return True

    def _wake(self) -> None:
        if threading.get_ident() == self._thread:
            return
        with self._lock:
            if self._woken:
                return
            self._woken = True
            with contextlib.suppress(BlockingIOError):
                self._wake_writer.send(b"w")

    def _sleep_again(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(16)
        # Only now: who posts from here on wakes this thread again, and what was posted before is
        # sent next.
        with self._lock:
            self._woken = False


def encode(message: ToReceiver | ToSender) -> bytes:
    """A message as it goes over the wire."""
    return enclose(_encoder.encode(message))


_encoder = msgspec.msgpack.Encoder()
