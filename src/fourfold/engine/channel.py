"""The wire between a gateway and an engine in another process: typed messages over a socket.

A message is msgpack behind its length and checksums. A worker says `Hello`, the gateway `Load`, and
the worker answers with `Progress` until it says `Ready` or `LoadFailed`; then requests and aborts
go one way, and what each step brought goes the other. Both say something at least every
`ALIVE_SECONDS`. Whoever finds the socket closed, or hears nothing for long, takes the other process
for dead.
"""

from __future__ import annotations

import socket
from typing import Any, Generic, TypeVar

import msgspec

from fourfold.engine.building import EngineSetup, ModelFacts
from fourfold.engine.messages import (
    Abort,
    Continue,
    EngineStats,
    Granted,
    HandoverNews,
    Role,
    Submit,
    TokenOutput,
)
from fourfold.errors import ConfigError
from fourfold.transport.config import TransportConfig
from fourfold.transport.envelope import enclose, opened
from fourfold.transport.format import PageFormat
from fourfold.transport.peer import Peer
from fourfold.transport.stats import PathStats

ALIVE_SECONDS = 0.5

_LONGEST = 1 << 28
"""Bytes of a message at most: what claims to be longer is no message."""
_READ_BYTES = 1 << 18


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A worker is there; its first message of all."""

    name: str
    role: Role
    pid: int


class Load(msgspec.Struct, frozen=True, tag=True):
    """Build this engine; the answer to `Hello`."""

    setup: EngineSetup
    timeout: float | None = None
    """Seconds of silence, once `Alive` was said, after which the other side is taken for dead. None
    on one machine, where its end is that of the socket, and silence is none."""
    ordinal: int = 0
    """Of this worker among the `workers` that the gateway started on its machine."""
    workers: int = 1
    transport: TransportConfig | None = None
    """For its node, if the gateway started it; one that joined has its own."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The gateway does not take this worker, for the reason said; `again`: it may ask later."""

    message: str
    again: bool = False


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Let the running step finish, then end the process."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """The gateway is there and has nothing else to say."""


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """The worker was asked to end: it takes nothing new and waits for `Stop`."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far the weights are loaded, in bytes."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine takes requests. `ValueError` where its peer has no pages."""

    model: ModelFacts
    max_context: int
    """Tokens of prompt and answer together at most."""
    stats: EngineStats
    peer: Peer
    """How others reach its pages."""
    device: str
    """What it computes on."""

    def __post_init__(self) -> None:
        if self.peer.pages is None:
            raise ValueError("a worker without pages")

    @property
    def pages(self) -> PageFormat:
        """What its pages are."""
        assert self.peer.pages is not None, "checked above"
        return self.peer.pages


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot be built; `kind` names a class of `fourfold.errors`."""

    kind: str
    message: str


class News(msgspec.Struct, frozen=True, tag=True):
    """What came of one step, or of several if they came faster than they could be sent."""

    outputs: list[TokenOutput]
    """Empty where only the numbers have changed."""
    stats: EngineStats
    time: float
    """When the engine had the first of it: `time.perf_counter()`, the same clock for both sides if
    they share a machine."""
    handover: list[HandoverNews] = []
    paths: list[PathStats] | None = None
    """What came of its links to other workers; now and then."""


ToEngine = Load | Refused | Stop | Alive | Submit | Abort | Granted | Continue
FromEngine = Hello | Progress | Ready | LoadFailed | News | Leaving

Incoming = TypeVar("Incoming")


class Channel(Generic[Incoming]):
    """One end of the wire, which hears messages of the type `incoming` (a union)."""

    def __init__(self, connection: socket.socket, incoming: Any) -> None:
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(incoming, dec_hook=_decode_other)
        self._arrived = bytearray()

    def send(self, message: ToEngine | FromEngine) -> None:
        """Sends a message, waiting until there is room. Raises `OSError` where nobody listens, or
        where there was no room for as long as the socket waits."""
        left = memoryview(encode(message))
        while left:  # `sendall` would wait for the whole of it only so long
            left = left[self._connection.send(left) :]

    def receive(self) -> list[Incoming]:
        """The messages that one read completes: none where only a part of one came.

        Waits for something to read, or raises `BlockingIOError` if the socket does not block, or
        `TimeoutError` if it has a timeout. Raises `EOFError` when the other side has gone, and
        `ValueError` where what comes is no message.
        """
        try:
            data = self._connection.recv(_READ_BYTES)
        except (BlockingIOError, TimeoutError):
            raise
        except OSError:  # reset, or given up by the system
            data = b""
        if not data:
            raise EOFError
        self._arrived += data
        messages, start = [], 0
        with memoryview(self._arrived) as view:
            while (found := opened(view, start, _LONGEST)) is not None:
                body, start = found
                try:
                    messages.append(self._decoder.decode(body))
                except ConfigError as error:  # options that this version of the worker refuses
                    raise ValueError(str(error)) from error
                body.release()
        del self._arrived[:start]
        return messages


def encode(message: ToEngine | FromEngine) -> bytes:
    """A message as it goes over the wire."""
    return enclose(_encoder.encode(message))


def _decode_other(kind: type[Any], value: Any) -> Any:
    """What msgpack has no type for goes as text: paths."""
    return kind(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=str)
