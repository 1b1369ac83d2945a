"""Connections from those who have no business here. Each returns what was wrong, if anything."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Sequence

import msgspec
import xxhash

from fourfold.errors import AuthenticationError, FourfoldError
from fourfold.transport.control import Finish, ToSender, encode
from fourfold.transport.envelope import HEAD_BYTES
from fourfold.transport.frames import Header, Kind, encode_header
from fourfold.transport.handshake import Handshake, Purpose, Role
from fourfold.transport.identity import Identity
from fourfold.transport.peer import Peer
from fourfold.transport.pieces import Part
from fourfold.transport.wire import Wire, dial

_SECONDS = 10.0
Address = tuple[str, int]


def say_garbage(address: Address, rng: random.Random) -> str | None:
    """Random bytes, or the beginning of something known, some of it never finished."""
    beginnings = (b"", b"4FLD\x01\x00\x01\x00", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64)
    with contextlib.suppress(OSError), socket.create_connection(address, _SECONDS) as connection:
        connection.sendall(rng.choice(beginnings) + rng.randbytes(rng.choice((0, 1, 100, 5000))))
        connection.settimeout(rng.choice((0.05, 0.5)))
        while connection.recv(4096):
            pass
    return None


def say_nothing(address: Address, rng: random.Random) -> str | None:
    """Several connections that are merely open for a while."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as connections:
        for _ in range(rng.randint(2, 20)):
            connections.enter_context(socket.create_connection(address, _SECONDS))
        time.sleep(rng.random())
    return None


def show_wrong_key(address: Address, rng: random.Random) -> str | None:
    """A handshake with another key, which must fail."""
    purpose = rng.choice(list(Purpose))
    stranger = Identity(name="stranger", epoch=1, model="")
    handshake = Handshake(Role.DIALLER, stranger, b"another key than theirs", purpose=purpose)
    try:
        wire, _ = dial(*address, handshake, _SECONDS, None)
    except AuthenticationError:
        return None
    except (OSError, FourfoldError):  # too busy to listen
        return None
    wire.close()
    return f"{address} lets somebody in who has another key"


def write_stale(peer: Peer, key: bytes, leases: Sequence[int], rng: random.Random) -> str | None:
    """Frames for leases, of which some are in use, from one who is not their writer or means an
    earlier incarnation of the receiver; the receiver must not mind."""
    identity = Identity(name="yesterday", epoch=rng.getrandbits(63), model="")
    session = os.urandom(16)
    wires: list[Wire] = []
    try:
        for purpose in (Purpose.LINK, Purpose.STREAM):
            handshake = Handshake(Role.DIALLER, identity, key, purpose=purpose, session=session)
            wires.append(dial(peer.host, peer.port, handshake, _SECONDS, None)[0])
            if purpose is Purpose.LINK:
                _hear(wires[0])
        control, stream = wires
        for lease in [*leases, rng.getrandbits(63)]:
            payload = rng.randbytes(rng.choice((64, 16384)))
            head = Header(
                kind=Kind.DATA,
                epoch=peer.epoch if rng.random() < 0.7 else rng.getrandbits(63),
                lease=lease,
                part=rng.choice(list(Part)),
                layer=0,
                layers=1,
                first=0,
                count=1,
                length=len(payload),
                checksum=xxhash.xxh3_64_intdigest(payload),
            )
            stream.send([memoryview(encode_header(head) + payload)])
            control.send([memoryview(encode(Finish(lease, 1)))])
        time.sleep(0.05)
    except (OSError, EOFError, FourfoldError):  # it was lost meanwhile, or is too busy
        pass
    finally:
        for wire in wires:
            wire.shut()
            wire.close()
    return None


def _hear(wire: Wire) -> ToSender:
    head = bytearray(HEAD_BYTES)
    wire.receive([memoryview(head)])
    body = bytearray(int.from_bytes(head[:4], "little"))
    wire.receive([memoryview(body)])
    return msgspec.msgpack.decode(bytes(body), type=ToSender)
