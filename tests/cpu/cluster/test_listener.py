"""The door of a cluster: who is let in, who is not, and what goes through it under TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from fourfold.cluster import listener
from fourfold.cluster.listener import ClusterListener
from fourfold.cluster.wiring import plain_socket
from fourfold.engine.building import EngineSetup
from fourfold.engine.channel import Channel, Hello, Load, LoadFailed, Refused, ToEngine
from fourfold.engine.messages import Role
from fourfold.errors import AuthenticationError, FourfoldError
from fourfold.gateway.fleet.config import FleetConfig
from fourfold.gateway.fleet.fleet import Fleet
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.transport.config import TlsFiles, TransportConfig
from fourfold.transport.handshake import Handshake, Purpose
from fourfold.transport.handshake import Role as Side
from fourfold.transport.identity import Identity
from fourfold.transport.tls import load_tls
from fourfold.transport.wire import Wire, dial
from tests.cpu.transport.test_lifetime import STRANGER, TLS

KEY = b"a secret of the whole service"
PATIENCE = 20.0


class Door:
    """A fleet that listens, and those who knock."""

    def __init__(self, tls: TlsFiles | None) -> None:
        setup = EngineSetup(source=Source(SourceKind.DIRECTORY, Path("/nowhere"), "model"))
        transport = TransportConfig(key=KEY, tls=tls)
        self.fleet = Fleet(setup, FleetConfig(worker_timeout=60.0), transport, 30.0)
        self.listener = ClusterListener(self.fleet, 0, transport)
        self.host, port = self.listener.address.rsplit(":", 1)
        self.port = int(port)

    def knock(
        self,
        *,
        key: bytes = KEY,
        purpose: Purpose = Purpose.GATEWAY,
        tls: TlsFiles | None = None,
    ) -> socket.socket:
        """Joins as a worker does."""
        identity = Identity(name="far", epoch=5, model="")
        handshake = Handshake(Side.DIALLER, identity, key, purpose=purpose)
        context = None if tls is None else load_tls(tls)
        wire, _ = dial(self.host, self.port, handshake, PATIENCE, context)
        return plain_socket(wire, 5.0, secured=tls is not None)

    def meet(self, connection: socket.socket, name: str) -> Channel[ToEngine]:
        """Says hello, and is told what to load."""
        connection.settimeout(PATIENCE)
        channel: Channel[ToEngine] = Channel(connection, ToEngine)
        channel.send(Hello(name, Role.BOTH, 5))
        assert isinstance(hear(channel), Load)
        return channel


def hear(channel: Channel[ToEngine]) -> ToEngine:
    """The next message, heartbeats left out."""
    while True:
        for message in channel.receive():
            if isinstance(message, Load | Refused):
                return message


@contextlib.asynccontextmanager
async def opened(tls: TlsFiles | None = None) -> AsyncIterator[Door]:
    door = Door(tls)
    door.fleet.start(lambda outputs, since=None: None)
    door.listener.start()
    yield door
    door.listener.close()
    await asyncio.to_thread(door.fleet.stop)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def go(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(main())


@pytest.mark.parametrize("tls", [None, TLS], ids=["plain", "tls"])
def test_messages_of_any_size_go_both_ways_and_an_end_is_noticed(tls: TlsFiles | None) -> None:
    async def main() -> None:
        async with opened(tls) as door:
            connection = await asyncio.to_thread(door.knock, tls=tls)
            channel = await asyncio.to_thread(door.meet, connection, "a")
            [member] = door.fleet.members
            long = "x" * 5_000_000
            heard: list[str] = []
            door.fleet.on_event = lambda member, message, why: heard.append(
                message.message if isinstance(message, LoadFailed) else why
            )
            await asyncio.to_thread(channel.send, LoadFailed("ConfigError", long))
            await eventually(lambda: heard == [long])
            member.send(Refused(long))
            answer = await asyncio.to_thread(hear, channel)
            assert answer == Refused(long)
            connection.close()
            await eventually(lambda: not door.fleet.members)
            assert heard[-1] == "it closed its connection"

    go(main)


@pytest.fixture
def many_open_files() -> Iterator[None]:
    """All further descriptors have numbers above 1023, as in a gateway with many clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held = []
    try:
        while not held or held[-1] < 1024:
            held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("tls", "files"), [(None, ""), (TLS, " --tls-cert CERT --tls-key KEY --tls-ca CA")]
)
def test_who_would_join_is_told_which_files_it_needs(tls: TlsFiles | None, files: str) -> None:
    async def main() -> None:
        async with opened(tls) as door:
            start = f"fourfold worker --join {door.host}:{door.port} --key-file KEY_FILE"
            assert door.listener.command == start + files

    go(main)


def test_who_would_join_is_told_the_advertised_address() -> None:
    setup = EngineSetup(source=Source(SourceKind.DIRECTORY, Path("/nowhere"), "model"))
    transport = TransportConfig(host="0.0.0.0", advertise="server.example", key=KEY)
    with contextlib.closing(
        ClusterListener(Fleet(setup, FleetConfig(), transport, 30.0), 0, transport)
    ) as door:
        assert re.search(r" --join server\.example:[1-9]\d* ", door.command)


@pytest.mark.usefixtures("many_open_files")
def test_a_worker_joins_under_tls_however_many_files_are_open() -> None:
    async def main() -> None:
        async with opened(TLS) as door:
            connection = await asyncio.to_thread(door.knock, tls=TLS)
            await asyncio.to_thread(door.meet, connection, "a")
            assert [member.name for member in door.fleet.members] == ["a"]
            connection.close()
            await eventually(lambda: not door.fleet.members)

    go(main)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other options")
@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize(("silence", "asks_after"), [(5.0, 5), (0.1, 1), (1e9, 32_767)])
def test_the_system_asks_after_a_host_that_says_nothing(
    secured: bool, silence: float, asks_after: int
) -> None:
    """A worker that waits for what to load would wait for ever for one that lost its power."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    watched = socket.socket(fileno=os.dup(near.fileno()))  # options are the connection's
    with far, watched, plain_socket(Wire(near), silence, secured=secured):
        assert watched.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert watched.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == asks_after
        assert watched.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0


def test_an_end_of_the_gateway_is_noticed_through_tls() -> None:
    async def main() -> None:
        async with opened(TLS) as door:
            connection = await asyncio.to_thread(door.knock, tls=TLS)
            channel = await asyncio.to_thread(door.meet, connection, "a")
            [member] = door.fleet.members
            member.send(Refused("last words"))
            member.end("it is over")
            assert await asyncio.to_thread(hear, channel) == Refused("last words")
            with pytest.raises(EOFError):
                await asyncio.to_thread(channel.receive)
            connection.close()

    go(main)


@pytest.mark.parametrize(
    ("knock", "error", "said"),
    [
        ({"key": b"another secret altogether"}, AuthenticationError, "key differs"),
        ({"tls": STRANGER}, (OSError, FourfoldError), "closed"),
        ({"tls": None, "key": KEY}, (OSError, FourfoldError), "closed"),
    ],
    ids=["key", "certificate", "no tls"],
)
def test_strangers_are_turned_away_with_a_log_line(
    knock: dict[str, Any],
    error: type[Exception],
    said: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener, "_GREETING_SECONDS", 1.0)

    async def main() -> None:
        tls = TLS if "tls" in knock else None
        async with opened(tls) as door:
            with caplog.at_level(logging.WARNING):
                with pytest.raises(error):
                    await asyncio.to_thread(knock_and_listen, door, knock)
                await eventually(lambda: "to the cluster port is closed" in caplog.text)
            assert said in caplog.text
            assert not door.fleet.members
            connection = await asyncio.to_thread(lambda: door.knock(tls=tls))
            await asyncio.to_thread(door.meet, connection, "a friend")
            connection.close()

    go(main)


def knock_and_listen(door: Door, knock: dict[str, Any]) -> None:
    """Under TLS 1.3 the dialler may learn only when it reads that it is not wanted."""
    connection = door.knock(**knock)
    connection.settimeout(PATIENCE)
    if not connection.recv(1):
        raise ConnectionResetError


@pytest.mark.parametrize("junk", [b"", b"GET / HTTP/1.1\r\n\r\n" * 8, bytes(1000)])
def test_garbage_and_silence_are_turned_away(
    junk: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_GREETING_SECONDS", 0.5)

    async def main() -> None:
        async with opened() as door:
            crowd = [socket.create_connection((door.host, door.port)) for _ in range(20)]
            with caplog.at_level(logging.WARNING):
                for connection in crowd:
                    connection.sendall(junk)
                await eventually(lambda: caplog.text.count("cluster port is closed") == 20)
            connection = await asyncio.to_thread(door.knock)
            await asyncio.to_thread(door.meet, connection, "a friend")
            for stranger in (connection, *crowd):
                stranger.close()

    go(main)


def test_those_who_say_nothing_keep_no_worker_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_GREETING_SECONDS", 2 * PATIENCE)

    async def main() -> None:
        async with opened() as door:
            crowd = [socket.create_connection((door.host, door.port)) for _ in range(30)]
            connection = await asyncio.to_thread(door.knock)
            await asyncio.to_thread(door.meet, connection, "a friend")
            for stranger in (connection, *crowd):
                stranger.close()

    go(main)


def test_a_worker_that_wants_pages_is_turned_away(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with opened() as door:
            with caplog.at_level(logging.WARNING):
                connection = await asyncio.to_thread(lambda: door.knock(purpose=Purpose.LINK))
                await eventually(lambda: "a gateway has none" in caplog.text)
            assert not door.fleet.members
            connection.close()

    go(main)


def has_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_more_than_may_wait_are_closed_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_GREETED_AT_ONCE", 3)

    async def main() -> None:
        async with opened() as door:
            crowd = [socket.create_connection((door.host, door.port)) for _ in range(5)]
            for connection in crowd:
                connection.setblocking(False)
            await eventually(lambda: sum(map(has_ended, crowd)) == 2)
            for connection in crowd:
                connection.close()

    go(main)


RESTING = """
import asyncio, errno, logging, os, resource, socket, sys
from fourfold.cluster import listener
from tests.cpu.cluster.test_listener import opened

listener._REST_SECONDS = 0.2
logging.basicConfig(stream=sys.stdout)

async def main():
    async with opened() as door:
        with socket.socket() as stranger:
            stranger.setblocking(False)
            await asyncio.sleep(0.01)  # all that is opened once, is
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            held = []
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                pass
            assert stranger.connect_ex((door.host, door.port)) in (0, errno.EINPROGRESS)
            await asyncio.sleep(1.0)
            for number in held:
                os.close(number)
        connection = await asyncio.to_thread(door.knock)
        await asyncio.to_thread(door.meet, connection, "a friend")
        connection.close()

asyncio.run(main())
print("a friend was let in")
"""


def test_out_of_files_the_door_rests_and_opens_again() -> None:
    """Who waits to be accepted wakes the loop all the time: requests would find it busy. In a
    process of its own, for all threads share descriptors."""
    done = subprocess.run(
        [sys.executable, "-c", RESTING], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    refused = done.stdout.count("no worker can join for now: Too many open files")
    assert 1 < refused < 10
    assert done.stdout.endswith("a friend was let in\n")
