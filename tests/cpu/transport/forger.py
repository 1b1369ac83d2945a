"""A peer that says what it likes: a sender of hand-made frames and messages."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import xxhash

from fourfold.transport.control import ToReceiver, ToSender, Welcome, encode
from fourfold.transport.envelope import HEAD_BYTES
from fourfold.transport.frames import Header, Kind, encode_header
from fourfold.transport.handshake import Handshake, Purpose, Role
from fourfold.transport.identity import Identity
from fourfold.transport.peer import Peer
from fourfold.transport.pieces import Part
from fourfold.transport.wire import Wire, dial
from tests.cpu.transport.nodes import PAGES


class Forger:
    """Holds the key and knows the protocol, and keeps to nothing else."""

    def __init__(self, peer: Peer, *, epoch: int = 1, streams: int = 2) -> None:
        self.peer = peer
        self._identity = Identity(name="forger", epoch=epoch, model="m", pages=PAGES)
        self._session = os.urandom(16)
        self.control = self.dial(Purpose.LINK)
        assert isinstance(self.hear(), Welcome)
        self.streams = [self.dial(Purpose.STREAM) for _ in range(streams)]

    def dial(self, purpose: Purpose) -> Wire:
        handshake = Handshake(
            Role.DIALLER, self._identity, None, purpose=purpose, session=self._session
        )
        return dial(self.peer.host, self.peer.port, handshake, 10.0, None)[0]

    def frame(
        self, lease: int, layer: int, first: int, data: bytes, *, count: int = 1, **changes: Any
    ) -> bytes:
        """A frame of whole pages as it would be right, but for `changes` of its header."""
        header = Header(
            kind=Kind.DATA,
            epoch=self.peer.epoch,
            lease=lease,
            part=Part.PAGES,
            layer=layer,
            layers=1,
            first=first,
            count=count,
            length=len(data),
            checksum=xxhash.xxh3_64_intdigest(data),
        )
        return encode_header(msgspec.structs.replace(header, **changes)) + data

    def send(self, stream: int, data: bytes) -> None:
        self.streams[stream].send([memoryview(data)])

    def say(self, message: ToReceiver) -> None:
        self.control.send([memoryview(encode(message))])

    def hear(self) -> ToSender:
        """The next message. Raises `EOFError` or `OSError` at the end of the link."""
        head = bytearray(HEAD_BYTES)
        self.control.receive([memoryview(head)])
        body = bytearray(int.from_bytes(head[:4], "little"))
        self.control.receive([memoryview(body)])
        return msgspec.msgpack.decode(bytes(body), type=ToSender)

    def wait_until_closed(self) -> None:
        """Returns when the receiver has closed the link."""
        try:
            while True:
                self.hear()
        except (EOFError, OSError):
            return

    def close(self) -> None:
        for wire in (self.control, *self.streams):
            wire.shut()
            wire.close()
