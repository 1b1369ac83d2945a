"""The real HTTP server before a scripted gateway, for every test of this folder.

Everything between the socket and the gateway's interface is the real thing: uvicorn with its
protocol class, the middleware, the routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from fourfold.api.app import create_app
from fourfold.api.config import ApiConfig
from fourfold.api.server import bind, run, serve
from tests.cpu.api.fakes import FakeGateway


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server: where it is, what is behind it, and how it was set up."""

    base_url: str
    gateway: Any
    config: ApiConfig
    stop: Callable[[], None]
    """Starts the graceful end."""
    thread: threading.Thread

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.base_url)
        assert url.port
        return url.host, url.port

    def quiet(self, timeout: float = 3.0) -> bool:
        """Whether the gateway holds nothing, now or within `timeout` seconds."""
        return eventually(lambda: self.gateway.active == 0, timeout)


def eventually(condition: Callable[[], bool], timeout: float = 3.0) -> bool:
    """Whether `condition` comes true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def running_server(gateway: Any, config: ApiConfig) -> Iterator[Server]:
    """Serves `gateway`, scripted or real, from a thread of its own, and joins it."""
    listener = bind(config)
    ready = threading.Event()
    shared: dict[str, Any] = {}

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        shared["stop"] = lambda: loop.call_soon_threadsafe(stop.set)

        def on_ready(url: str) -> None:
            shared["url"] = url
            ready.set()

        app = create_app(gateway, config)
        gateway.start()
        try:
            await serve(app, gateway, config, listener=listener, on_ready=on_ready, stop=stop)
        finally:
            await gateway.stop()

    thread = threading.Thread(target=run, args=(main(),))
    thread.start()
    assert ready.wait(10)
    yield Server(
        base_url=shared["url"],
        gateway=gateway,
        config=config,
        stop=shared["stop"],
        thread=thread,
    )
    if thread.is_alive():
        shared["stop"]()
    thread.join(15)
    assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="package")
def shared_server() -> Iterator[Server]:
    config = ApiConfig(
        port=0, header_timeout=0.5, body_timeout=0.5, write_timeout=0.5, drain_timeout=0.2
    )
    with running_server(FakeGateway(), config) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """A server with short timeouts, its gateway as new; it must be left with nothing held."""
    shared_server.gateway.reset()
    yield shared_server
    assert shared_server.quiet(), "the test left a generation behind"


@pytest.fixture
def gateway(server: Server) -> FakeGateway:
    """The gateway behind `server`."""
    fake: FakeGateway = server.gateway
    return fake


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts further servers, with options of their own, that end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            running_server(FakeGateway(), ApiConfig(port=0, **options))
        )


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client of `server`."""
    with httpx.Client(base_url=server.base_url, timeout=10, verify=False) as client:
        yield client


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_gateway: needs the budgets of the real gateway")
