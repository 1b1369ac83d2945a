"""The door at which workers join: accepts, has both sides prove that they hold the key, and hands
the connection to the fleet."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor

from fourfold.cluster.wiring import plain_socket
from fourfold.errors import FourfoldError
from fourfold.gateway.fleet.fleet import Fleet
from fourfold.transport.config import TransportConfig
from fourfold.transport.handshake import ForeignError, Handshake, Purpose, Role
from fourfold.transport.identity import Identity
from fourfold.transport.tls import load_tls
from fourfold.transport.wire import answer, listen

logger = logging.getLogger(__name__)

_GREETED_AT_ONCE = 64
"""Connections whose handshake is not over; more are closed unread."""
_GREETING_SECONDS = 5.0
_REST_SECONDS = 0.5
"""Until the next try where a connection could not be accepted, for it still asks to be."""


class ClusterListener:
    """Lets workers join a fleet. To be used on the loop that the fleet listens on."""

    def __init__(self, fleet: Fleet, port: int, transport: TransportConfig) -> None:
        """Takes `port` at the address of `transport`, whose key and TLS it wants. Raises
        `ConfigError` where the port, or TLS, cannot be had."""
        self._fleet = fleet
        self._key, self._advertise = transport.key, transport.advertise
        self._tls = None if transport.tls is None else load_tls(transport.tls)
        self._socket = listen(transport.host, port)
        self._socket.setblocking(False)
        # The same for all workers that join: none of them has pages yet to compare.
        self._identity = Identity(name="gateway", epoch=secrets.randbits(63), model="")
        self._threads = ThreadPoolExecutor(_GREETED_AT_ONCE, "greeting")
        self._greetings: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def address(self) -> str:
        """HOST:PORT, as `fourfold worker --join` wants it where others are to reach it."""
        host, port, *_ = self._socket.getsockname()
        host = self._advertise or host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def command(self) -> str:
        """By which a worker joins; what its user must fill in is in capitals."""
        key = "" if self._key is None else " --key-file KEY_FILE"
        tls = "" if self._tls is None else " --tls-cert CERT --tls-key KEY --tls-ca CA"
        return f"fourfold worker --join {self.address}{key}{tls}"

    def start(self) -> None:
        """Lets workers join, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._accept)

    def pause(self) -> None:
        """Lets none join until it is started again, or closed."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._loop = None

    def close(self) -> None:
        """Gives the address back."""
        self.pause()
        self._socket.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):  # it has gone again
            return
        except OSError as error:  # for instance no more descriptors; others may free some
            logger.warning("no worker can join for now: %s", error.strerror or error)
            assert self._loop is not None
            self._loop.remove_reader(self._socket)
            self._loop.call_later(_REST_SECONDS, self._go_on, self._loop)
            return
        if len(self._greetings) >= _GREETED_AT_ONCE:
            connection.close()
            return
        assert self._loop is not None
        greeting = self._loop.create_task(self._greet(connection))
        self._greetings.add(greeting)
        greeting.add_done_callback(self._greetings.discard)

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is loop:  # neither paused nor closed meanwhile
            loop.add_reader(self._socket, self._accept)

    async def _greet(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        address = "somebody who has gone"
        with contextlib.suppress(OSError):
            address = str(connection.getpeername()[0])
        handshake = Handshake(Role.LISTENER, self._identity, self._key)
        try:
            wire, introduction = await loop.run_in_executor(
                self._threads, answer, connection, handshake, _GREETING_SECONDS, self._tls
            )
            if introduction.purpose is not Purpose.GATEWAY:
                wire.close()
                raise ForeignError("it wants pages, and a gateway has none")
            timeout = self._fleet.config.worker_timeout
            joined = plain_socket(wire, timeout, secured=self._tls is not None)
        except (OSError, FourfoldError) as error:
            logger.warning("a connection from %s to the cluster port is closed: %s", address, error)
            return
        if self._fleet.stopping or self._loop is None:
            joined.close()
            return
        logger.info("worker %s joins from %s", introduction.identity.name, address)
        self._fleet.add(joined)
