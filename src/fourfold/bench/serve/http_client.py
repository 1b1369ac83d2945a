"""A small HTTP/1.1 client that knows when each byte arrived.

A load generator must not measure itself. Reading one token's event costs the generator about 10
microseconds of CPU, parsing and JSON included; httpx takes 44 before any parsing (both on uvloop,
128 streams, one core of a Zen 3), so it would fill that core near 20,000 events a second, which
one GPU can send. Hence an asyncio protocol over httptools that takes the time as soon as a packet
is read, and any number of keep-alive connections. It gives up what a benchmark does not want
anyway: redirects, proxies from the environment, compression, retries.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

Sink = Callable[[int, bytes, float], None]
"""Called with (HTTP status, piece of the body, `time.perf_counter()` of its arrival)."""

_IDLE_LIMIT_S = 2.0
"""Idle connections older than this are not used again: servers close theirs after 5 s and more,
and a request that crosses such a close would look like a failure of the server."""


class DisconnectError(ConnectionError):
    """The server closed the connection before the answer was complete."""


class MalformedError(ValueError):
    """The server sent something that is not HTTP."""


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.open = True
        self.idle_since = 0.0
        self.reusable = False
        self._status = 0
        self._framed = False
        self._arrived = 0.0
        self._sink: Sink | None = None
        self._ended: asyncio.Future[int] | None = None

    async def exchange(self, request: bytes, sink: Sink) -> int:
        """Sends a request and returns the status once the whole answer went into `sink`."""
        self._parser = httptools.HttpResponseParser(self)
        self._sink = sink
        self._status = 0
        self._framed = self.reusable = False
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._ended
        finally:
            if not self.reusable:
                self.close()

    def close(self) -> None:
        """Closes at once; harmless on a closed connection."""
        self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, for uvloop's transports are not of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._arrived = time.perf_counter()
        if self._ended is None or self._ended.done():
            self._transport.abort()  # an answer nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._end(error.__context__ or error)
        except httptools.HttpParserError as error:
            self._end(MalformedError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self.reusable = False
        if self._status and not self._framed and exc is None:
            self._end(None)  # a body without a length ends where the connection does
        else:
            self._end(DisconnectError(str(exc) if exc else "the server closed the connection"))

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._framed |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        assert self._sink is not None
        self._sink(self._status, body, self._arrived)

    def on_message_complete(self) -> None:
        if self._status >= 200:  # 1xx announces the real answer
            self.reusable = self._parser.should_keep_alive()
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        if self._ended is None or self._ended.done():
            return
        if error is None:
            self._ended.set_result(self._status)
        else:
            self._ended.set_exception(error)


class HttpClient:
    """Requests to one server, each on a connection of its own while it lasts."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        parts = urlsplit(base_url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname or ""
        self._address = self._host
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"host: {parts.netloc}\r\nuser-agent: fourfold-bench\r\n"
        if api_key is not None:
            self._headers += f"authorization: Bearer {api_key}\r\n"
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, body: bytes, sink: Sink) -> int:
        """Sends a JSON body, feeds the answer's body to `sink` as it comes, returns the status.

        OSError where no connection can be made, DisconnectError and MalformedError where the
        answer breaks off or is not HTTP. Cancelling closes the connection.
        """
        head = (
            f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        connection = await self._connection()
        status = await connection.exchange(head.encode() + body, sink)
        if connection.reusable:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        return status

    async def read(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """The status and whole body of an answer; raises as `request` does."""
        pieces: list[bytes] = []
        status = await self.request(method, path, body, lambda _, piece, __: pieces.append(piece))
        return status, b"".join(pieces)

    def close(self) -> None:
        """Closes the idle connections; those in use close with their requests."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open and time.monotonic() - connection.idle_since < _IDLE_LIMIT_S:
                return connection
            connection.close()
        transport, connection = await asyncio.get_running_loop().create_connection(
            _Connection,
            self._address,
            self._port,
            ssl=self._tls,
            server_hostname=self._host if self._tls else None,
        )
        # The name is looked up once: a thousand look-ups at once would be measured as latency.
        self._address = transport.get_extra_info("peername")[0]
        return connection
