"""The wire between a gateway and an engine in another process: typed messages over a local socket.

A message is msgpack behind its length in four bytes. A gateway sends `Load` first and the engine
answers with `Progress` until it says `Ready` or `LoadFailed`; then requests and aborts go one way,
and what each step brought goes the other. Whoever finds the socket closed knows that the other
process has ended.
"""

from __future__ import annotations

import socket
from typing import Any, Generic, TypeVar

import msgspec

from fourfold.engine.building import EngineSetup, ModelFacts
from fourfold.engine.messages import Abort, EngineStats, Submit, TokenOutput

_LENGTH_BYTES = 4
_READ_BYTES = 1 << 18


class Load(msgspec.Struct, frozen=True, tag=True):
    """Build this engine; the first message of all."""

    setup: EngineSetup


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Let the running step finish, then end the process."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far the weights are loaded, in bytes."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine takes requests."""

    model: ModelFacts
    max_context: int
    """Tokens of prompt and answer together at most."""
    stats: EngineStats


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
    """When the engine had the first of it: `time.perf_counter()`, the same clock for both sides."""


ToEngine = Load | Stop | Submit | Abort
FromEngine = Progress | Ready | LoadFailed | News

Incoming = TypeVar("Incoming")


class Channel(Generic[Incoming]):
    """One end of the wire, which hears messages of the type `incoming` (a union)."""

    def __init__(self, connection: socket.socket, incoming: Any) -> None:
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(incoming, dec_hook=_decode_other)
        self._arrived = bytearray()

    def send(self, message: ToEngine | FromEngine) -> None:
        """Sends a message, waiting until there is room. Raises `OSError` where nobody listens."""
        self._connection.sendall(encode(message))

    def receive(self) -> list[Incoming]:
        """The messages that one read completes: none where only a part of one came.

        Waits for something to read, or raises `BlockingIOError` if the socket does not block.
        Raises `EOFError` when the other side has closed its end.
        """
        try:
            data = self._connection.recv(_READ_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        self._arrived += data
        messages, start = [], 0
        with memoryview(self._arrived) as view:
            while len(view) - start >= _LENGTH_BYTES:
                begin = start + _LENGTH_BYTES
                end = begin + int.from_bytes(view[start:begin])
                if end > len(view):
                    break
                messages.append(self._decoder.decode(view[begin:end]))
                start = end
        del self._arrived[:start]
        return messages


def encode(message: ToEngine | FromEngine) -> bytes:
    """A message as it goes over the wire."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_LENGTH_BYTES) + body


def _decode_other(kind: type[Any], value: Any) -> Any:
    """What msgpack has no type for goes as text: paths."""
    return kind(value)


_encoder = msgspec.msgpack.Encoder(enc_hook=str)
