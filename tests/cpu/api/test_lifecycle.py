"""From a bound port to a clean exit: readiness, draining, signals, and what an import costs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fourfold.api.app import create_app
from fourfold.api.config import ApiConfig
from fourfold.api.server import bind, serve
from fourfold.engine.channel import Leaving
from fourfold.engine.messages import Role, Submit
from fourfold.errors import ConfigError
from tests.cpu.api.conftest import Server, eventually
from tests.cpu.api.fakes import FakeGateway
from tests.cpu.api.test_bad_input import CHAT, chat
from tests.cpu.gateway.test_fleet import eventually as soon
from tests.cpu.gateway.test_fleet import running

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def process(drain_timeout: float, words: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server with a slow gateway, and its URL; it must end by returning."""
    command = [sys.executable, "-m", "tests.cpu.api.serve_fake", str(drain_timeout), str(words)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout
        try:
            yield server, server.stdout.readline().strip()
            assert server.stdout.read().endswith("ended\n")
        finally:
            server.kill()


@contextlib.contextmanager
def begun_stream(url: str, words: int) -> Iterator[Iterator[str]]:
    """The lines of a stream of which the first has arrived."""
    body = chat(stream=True, max_tokens=words)
    with httpx.stream("POST", url + CHAT, json=body, timeout=30) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        yield lines


def test_sigterm_finishes_what_runs_and_refuses_what_comes() -> None:
    with process(drain_timeout=20, words=12) as (server, url), begun_stream(url, 12) as lines:
        server.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.get(f"{url}/health").status_code == 200
        refused = httpx.post(url + CHAT, json=chat())
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "server_unavailable"
        rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert sum('"content":"word "' in line for line in rest) == 12
        assert server.wait(20) == 0


def test_a_drain_that_takes_too_long_ends_with_an_error_event() -> None:
    with process(drain_timeout=0.3, words=300) as (server, url), begun_stream(url, 300) as lines:
        server.send_signal(signal.SIGINT)
        *_, last, empty = lines
        assert empty == ""
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert server.wait(20) == 0


def test_a_second_sigint_aborts_at_once() -> None:
    with process(drain_timeout=60, words=300) as (server, url), begun_stream(url, 300):
        server.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0  # long before the drain would end


def test_an_idle_server_ends_at_once(start: Callable[..., Server]) -> None:
    server = start()
    with httpx.Client(base_url=server.base_url) as client:
        assert client.get("/ready").json() == {"status": "ready"}
        server.stop()  # with the client's connection still open
        server.thread.join(20)
        assert not server.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.base_url}/health")


def test_a_half_sent_request_does_not_hold_up_the_end(start: Callable[..., Server]) -> None:
    from tests.cpu.api.test_bad_input import connected, head

    server = start(drain_timeout=0.1)
    with connected(server) as connection:
        connection.sendall(head(1000) + b"{")
        time.sleep(0.1)
        server.stop()
        server.thread.join(3)
        assert not server.thread.is_alive()


def test_a_taken_port_is_one_line_with_the_remedy(server: Server) -> None:
    _, port = server.address
    with pytest.raises(ConfigError) as error:
        bind(ApiConfig(port=port))
    assert str(error.value).startswith(f"port {port} on 127.0.0.1 is taken; ")
    assert "--port" in str(error.value)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a..b", "x" * 64])
def test_a_host_that_is_not_here_is_one_line_with_the_remedy(host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        bind(ApiConfig(host=host, port=0))


def test_a_port_taken_since_it_was_bound_is_one_line_too() -> None:
    """Until somebody listens, several may bind: two servers that load at the same time."""
    with bind(ApiConfig(port=0)) as first:
        config = ApiConfig(port=first.getsockname()[1])
        with bind(config) as second:
            first.listen()
            gateway = FakeGateway()
            serving = serve(create_app(gateway, config), gateway, config, listener=second)
            with pytest.raises(ConfigError, match=f"port {config.port} on 127.0.0.1 is taken; "):
                asyncio.run(serving)


def test_models_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert set(http.get("/version").json()) == {"version"}
    assert http.head("/ready").status_code == 200
    names = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert names == ["org/fake-moe", "default"]
    for path in ("/v1/models/org/fake-moe", "/v1/models/org%2Ffake-moe"):
        assert http.get(path).json()["max_model_len"] == 4096
    assert http.get("/v1/models/").status_code == 404


def test_ready_while_any_worker_of_a_fleet_takes_requests() -> None:
    """Of whichever role, since a lone one computes everything. Without any, requests wait."""

    async def main() -> None:
        gateway: Any = FakeGateway(ready=True)
        async with running() as run:
            transport = httpx.ASGITransport(create_app(gateway, ApiConfig(), run.fleet))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                assert (await http.get("/ready")).status_code == 503
                first = await run.worker("a", Role.PREFILL)
                assert (await http.get("/ready")).status_code == 200
                first.socket.close()
                await soon(lambda: not run.fleet.members)
                unready = await http.get("/ready")
                assert unready.status_code == 503
                assert unready.headers["retry-after"] == "5"
                assert "no worker takes requests" in unready.json()["error"]["message"]
                assert (await http.get("/health")).status_code == 200
                assert (await http.post(CHAT, json=chat())).status_code == 200
                second = await run.worker("b")
                assert (await http.get("/ready")).status_code == 200
                run.ask(1)
                await second.hear(Submit)
                second.say(Leaving())
                await soon(lambda: not second.member.takes_requests)
                assert (await http.get("/ready")).status_code == 503

    asyncio.run(main())


def test_the_options_cost_no_web_framework() -> None:
    code = (
        "import sys, fourfold.api, fourfold.api.config; "
        "assert not {'fastapi', 'uvicorn', 'pydantic', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
