"""A client that goes away ends its generations, whatever stage they are at."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from starlette.types import Message

from fourfold.api.following import ClientGoneError, while_connected
from tests.cpu.api.conftest import Server, eventually
from tests.cpu.api.fakes import FakeGateway
from tests.cpu.api.test_bad_input import COMPLETIONS, chat, complete, connected, head


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "generations"),
    [
        ("/v1/chat/completions", chat(max_tokens=9), 1),
        (COMPLETIONS, complete(prompt=["a", "b", "c"], n=2, max_tokens=9), 3),
    ],
)
def test_leaving_before_the_first_token(
    server: Server,
    gateway: FakeGateway,
    path: str,
    body: dict[str, Any],
    generations: int,
    stream: bool,
) -> None:
    gateway.say("slow", delay=30)
    content = json.dumps(body | {"stream": stream}).encode()
    with connected(server) as connection:
        connection.sendall(head(len(content), path) + content)
        assert eventually(lambda: gateway.active == generations)
    assert eventually(lambda: gateway.cancelled == generations)
    assert gateway.active == 0


def test_leaving_in_the_middle_of_a_stream(server: Server, gateway: FakeGateway) -> None:
    gateway.say("a", *["b"] * 1000, delay=0.02)
    body = chat(stream=True, max_tokens=1000)
    with httpx.stream("POST", f"{server.base_url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        assert gateway.active == 1
    assert eventually(lambda: gateway.cancelled == 1)
    assert gateway.active == 0


def test_leaving_while_being_admitted(server: Server, gateway: FakeGateway) -> None:
    gateway.say("a", admit_delay=0.2)
    content = json.dumps(chat()).encode()
    with connected(server) as connection:
        connection.sendall(head(len(content)) + content)
        time.sleep(0.05)
    time.sleep(0.3)
    assert (gateway.calls, gateway.active) == ([], 0)


def test_leaving_after_the_answer_cancels_nothing(server: Server, gateway: FakeGateway) -> None:
    content = json.dumps(chat(stream=True)).encode()
    with connected(server) as connection:
        connection.sendall(head(len(content)) + content)
        answer = b""
        while b"[DONE]" not in answer:
            answer += connection.recv(65_536)
    assert gateway.cancelled == 0
    assert 'outcome="finished"' in httpx.get(f"{server.base_url}/metrics").text


def test_many_clients_come_and_go(server: Server, gateway: FakeGateway) -> None:
    gateway.say(*"abcdefghij", delay=0.01)
    content = json.dumps(chat(stream=True, max_tokens=10)).encode()
    connections = [connected(server) for _ in range(30)]
    for connection in connections:
        connection.sendall(head(len(content)) + content)
    for number, connection in enumerate(connections):
        if number % 3:
            connection.recv(1000)
        if number % 2:
            connection.close()
    finished = 0
    for connection in connections[::2]:
        answer = b""
        while b"[DONE]" not in answer:
            answer += connection.recv(65_536)
        finished += 1
        connection.close()
    assert finished == 15
    assert server.quiet()


@pytest.mark.parametrize("noticed", [True, False])
def test_a_write_that_fails_is_a_client_that_left(noticed: bool) -> None:
    """A transport may be closed for a moment before the server says so; other faults stay."""

    async def receive() -> Message:
        await asyncio.sleep(0.01 if noticed else 60)
        return {"type": "http.disconnect"}

    async def work() -> None:
        raise ClientGoneError

    if noticed:
        assert asyncio.run(while_connected(receive, work())) is False
    else:
        with pytest.raises(ClientGoneError):
            asyncio.run(while_connected(receive, work()))
