"""Bounds below the API: sizes, times, connections, and clients that stop reading."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from fourfold.api.config import ApiConfig
from fourfold.errors import ConfigError
from tests.cpu.api.conftest import Server, eventually
from tests.cpu.api.test_bad_input import (
    CHAT,
    assert_serving,
    chat,
    connected,
    head,
    read_to_end,
)


def padded(size: int) -> bytes:
    """A good request of exactly this many bytes."""
    body = json.dumps(chat()).encode()
    return body + b" " * (size - len(body))


def post(server: Server, body: bytes, *, chunked: bool = False) -> httpx.Response:
    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    headers = {"content-type": "application/json"}
    content = pieces() if chunked else body
    return httpx.post(server.base_url + CHAT, content=content, headers=headers)


@pytest.mark.parametrize("chunked", [False, True])
def test_the_body_limit_is_exact(start: Callable[..., Server], chunked: bool) -> None:
    server = start(max_body_bytes=5000)
    assert post(server, padded(5000), chunked=chunked).status_code == 200
    refused = post(server, padded(5001), chunked=chunked)
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "request_too_large"
    assert refused.headers["connection"] == "close"


def test_a_body_announced_too_large_is_refused_unread(server: Server) -> None:
    with connected(server) as connection:
        connection.sendall(head(10**12))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_waits_for_100_continue(server: Server) -> None:
    body = json.dumps(chat()).encode()
    with connected(server) as connection:
        connection.sendall(
            head(len(body)).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
        )
        assert connection.recv(65_536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
    with connected(server) as connection:
        too_large = head(10**9).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
        connection.sendall(too_large)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_a_connection_that_says_nothing_is_closed(server: Server) -> None:
    with connected(server) as connection:
        assert read_to_end(connection) == b""


def test_line_ends_do_not_keep_an_idle_connection_alive(server: Server) -> None:
    with connected(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(65_536)

        def refused() -> bool:
            try:
                connection.sendall(b"\r\n")
            except ConnectionError:
                return True
            return False

        assert eventually(refused, timeout=server.config.header_timeout * 6)


def test_the_head_timer_starts_anew_with_each_request(server: Server) -> None:
    with connected(server) as connection:
        for _ in range(4):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            time.sleep(server.config.header_timeout / 2)
            connection.sendall(b"\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_slow_answer_outlives_the_head_timer(server: Server) -> None:
    server.gateway.say("a", "b", delay=server.config.header_timeout)
    body = json.dumps(chat(stream=True)).encode()
    with connected(server) as connection:
        # The head of a second request is begun, and stays unfinished, while the first is answered.
        connection.sendall(head(len(body)) + body)
        time.sleep(0.05)
        connection.sendall(b"GET /hea")
        time.sleep(0.05)
        connection.sendall(b"lth")
        answer = read_to_end(connection)
    assert b"data: [DONE]" in answer
    assert answer.endswith(b'"code":"request_timeout"}}')


def test_headers_without_end_get_431(server: Server) -> None:
    def ask() -> bytes:
        with connected(server) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            line = b"A: " + b"b" * 1000 + b"\r\n"
            for _ in range(server.config.max_head_bytes // len(line) + 1):
                connection.sendall(line)
            return read_to_end(connection)

    answer = b""
    for _ in range(5):
        # What the server has not read when it closes resets the connection, answer and all.
        with contextlib.suppress(ConnectionError):
            answer = ask()
            break
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"headers_too_large"' in answer
    assert_serving(server)


def ask_chunked(server: Server, rest: bytes, body: bytes = b"") -> bytes:
    """The answer to a good request in chunks of one byte, and to what follows the last of them."""
    body = body or json.dumps(chat()).encode()
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with connected(server) as connection:
        connection.sendall(chunked + b"".join(b"1\r\n%c\r\n" % byte for byte in body))
        connection.sendall(rest)
        return connection.recv(65_536)


@pytest.mark.parametrize("trailers", [b"A: " + b"b" * 1000 + b"\r\n", b"b"], ids=["many", "one"])
def test_trailers_without_end_are_cut_off(start: Callable[..., Server], trailers: bytes) -> None:
    server = start(max_head_bytes=5000)
    a_megabyte = b"A: " + trailers * ((1 << 20) // len(trailers))
    answer = b""
    with contextlib.suppress(ConnectionError):
        answer = ask_chunked(server, b"0\r\n" + a_megabyte + b"\r\n\r\n")
    assert answer == b""
    assert_serving(server)


def test_small_chunks_and_a_few_trailers_are_not_counted_as_too_many(
    start: Callable[..., Server],
) -> None:
    server = start(max_head_bytes=5000)
    rest = b"0\r\nA: " + b"b" * 4000 + b"\r\n\r\n"
    assert ask_chunked(server, rest, padded(100_000)).startswith(b"HTTP/1.1 200 ")


def test_what_is_not_http_gets_a_typed_400(server: Server) -> None:
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ):
        with connected(server) as connection:
            connection.sendall(nonsense)
            answer = read_to_end(connection)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'"code":"invalid_http"' in answer


def test_a_websocket_upgrade_is_answered_as_http(server: Server) -> None:
    with connected(server) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_one_connection_too_many_is_told_so(start: Callable[..., Server]) -> None:
    server = start(max_connections=2)
    with connected(server), connected(server), connected(server) as third:
        answer = read_to_end(third)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer
        assert b'"code":"too_many_connections"' in answer
    assert eventually(lambda: httpx.get(f"{server.base_url}/health").status_code == 200)


def test_a_client_that_stops_reading_is_cut_off(server: Server) -> None:
    server.gateway.say(*["word " * 20_000] * 500, delay=0.01)
    body = json.dumps(chat(max_tokens=500, stream=True)).encode()
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head(len(body)) + body)
        assert eventually(lambda: server.gateway.cancelled == 1, timeout=10)
    assert server.quiet()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_reads_steadily_gets_all_of_a_long_answer(
    start: Callable[..., Server], stream: bool
) -> None:
    """A megabyte a second: less than the kernel holds, unless told to, before it asks for more."""
    server = start(write_timeout=1.0)
    server.gateway.say("x" * (8 << 20))
    body = json.dumps(chat(stream=stream)).encode()
    enough, received = 5 << 20, 0
    with connected(server) as connection:
        connection.sendall(head(len(body)) + body)
        while received < enough and (piece := connection.recv(1 << 14)):
            received += len(piece)
            time.sleep(0.015)
    assert received >= enough


@pytest.mark.parametrize("size", [20_000, 150_000, 180_000, 4_000_000])
def test_whoever_reads_no_answer_holds_no_connection(
    start: Callable[..., Server], size: int
) -> None:
    """Nor one whose answer is all but written: what the kernel does not take waits here, and a
    connection that is closed waits for it."""
    server = start(write_timeout=1.0, keep_alive_timeout=1, max_connections=1)
    server.gateway.say("x" * size)
    body = json.dumps(chat()).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        connection.sendall(head(len(body)) + body)

        def let_in() -> bool:
            return httpx.get(f"{server.base_url}/health").status_code == 200

        assert not let_in()
        assert eventually(let_in, 10)


@pytest.mark.parametrize(
    "options",
    [
        {"port": -1},
        {"port": 70_000},
        {"max_connections": 0},
        {"max_body_bytes": 0},
        {"body_timeout": 0.0},
        {"header_timeout": float("nan")},
        {"write_timeout": float("inf")},
        {"drain_timeout": -1.0},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} "):
        ApiConfig(**options)  # type: ignore[arg-type]
