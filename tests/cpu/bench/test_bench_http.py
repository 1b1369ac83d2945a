"""The HTTP client against a server that writes exactly the bytes it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from fourfold.bench.serve import http_client
from fourfold.bench.serve.http_client import DisconnectError, HttpClient, MalformedError

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class ByteServer:
    """Answers every request with `answer`, and closes where told; counts its connections."""

    def __init__(self, answer: bytes, *, close: bool = False) -> None:
        self.answer = answer
        self.close = close
        self.connections = 0
        self.heads: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while not writer.is_closing():
            try:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            except asyncio.IncompleteReadError:
                break
            writer.write(self.answer)
            if self.close:
                writer.close()
        writer.close()


def exchange(
    server: ByteServer, talk: Callable[[HttpClient], Awaitable[object]], *, path: str = ""
) -> object:
    """What `talk` returns when it is given a client of `server`."""

    async def both() -> object:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        client = HttpClient(f"http://127.0.0.1:{port}{path}", api_key="k")
        try:
            async with asyncio.timeout(5):
                return await talk(client)
        finally:
            client.close()
            listening.close()

    return asyncio.run(both())


async def get(client: HttpClient) -> tuple[int, bytes]:
    return await client.read("GET", "/v1/models")


@pytest.mark.parametrize(
    ("answer", "close", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", False, (200, b"hi")),
        (CHUNKED + b"1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", False, (200, b"hi")),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", False, (503, b"")),
        (b"HTTP/1.0 200 OK\r\n\r\nto the end", True, (200, b"to the end")),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi",
            False,
            (200, b"hi"),
        ),
    ],
)
def test_answers(answer: bytes, close: bool, expected: tuple[int, bytes]) -> None:
    assert exchange(ByteServer(answer, close=close), get) == expected


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", DisconnectError),
        (CHUNKED + b"5\r\nhel", DisconnectError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel", DisconnectError),
        (b"SSH-2.0-OpenSSH\r\n", MalformedError),
        (CHUNKED + b"zz\r\n", MalformedError),
    ],
)
def test_answers_that_break_off(answer: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        exchange(ByteServer(answer, close=True), get)


def test_the_request_is_what_was_asked_for() -> None:
    server = ByteServer(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    exchange(server, get, path="/proxy/v1/")
    (head,) = server.heads
    assert head.startswith(b"GET /proxy/v1/models HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"\r\nauthorization: Bearer k\r\n" in head


async def twice(client: HttpClient) -> None:
    await get(client)
    await get(client)


def test_connections_are_kept_alive() -> None:
    server = ByteServer(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
    exchange(server, twice)
    assert (server.connections, len(server.heads)) == (1, 2)


def test_a_connection_that_asks_to_be_closed_is_not_kept() -> None:
    answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"
    server = ByteServer(answer)
    exchange(server, twice)
    assert server.connections == 2


def test_a_connection_that_was_idle_too_long_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_IDLE_LIMIT_S", 0.0)
    server = ByteServer(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
    exchange(server, twice)
    assert server.connections == 2


def test_a_cancelled_request_closes_its_connection() -> None:
    server = ByteServer(CHUNKED)

    async def impatient(client: HttpClient) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await get(client)
        server.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
        assert await get(client) == (200, b"hi")

    exchange(server, impatient)
    assert server.connections == 2


def test_an_error_in_the_sink_is_not_taken_for_the_servers() -> None:
    async def clumsy(client: HttpClient) -> None:
        def sink(status: int, piece: bytes, at: float) -> None:
            raise ZeroDivisionError

        await client.request("GET", "/", b"", sink)

    with pytest.raises(ZeroDivisionError):
        exchange(ByteServer(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"), clumsy)
