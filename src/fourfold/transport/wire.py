"""One connection, plain or under TLS: whole payloads for pages, bits of messages for control."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import sys
import time
from collections.abc import Sequence

from fourfold.errors import ConfigError
from fourfold.transport.handshake import ForeignError, Handshake, Introduction
from fourfold.transport.tls import Tls, hash_certificate

_MAX_VIEWS = 1024
"""Pieces of memory that one system call takes."""
_AHEAD_BYTES = 1 << 13
_LONGEST_IDLE = 32_767
"""Seconds; Linux takes no longer time before a keepalive."""
_WAIT_ALL = getattr(socket, "MSG_WAITALL", 0)
_ACKNOWLEDGED = struct.Struct("=120xQ")
"""Where Linux says it in `struct tcp_info`."""


class Wire:
    """A connected socket. Each direction is for one thread; `shut` and `close` are for any.

    Only `send` and `receive` wait, and `shut` ends their waiting.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._tls = connection if isinstance(connection, ssl.SSLSocket) else None
        self._buffer = memoryview(bytearray(_AHEAD_BYTES))
        self._ahead = self._buffer[:0]
        """Read, and not asked for yet."""
        self.address = _address(connection)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        """Whether `receive_some` has something that a poll would not show."""
        return self._tls is not None and self._tls.pending() > 0

    @property
    def acknowledged(self) -> int:
        """Bytes sent that have come to the peer's system so far; 0 where this one does not say.
        For any thread, until `close`."""
        if sys.platform != "linux":
            return 0
        size = _ACKNOWLEDGED.size
        told = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
        return int(_ACKNOWLEDGED.unpack(told)[0]) if len(told) == size else 0

    def block(self, blocks: bool) -> None:
        """Whether calls wait: yes for `send` and `receive`, no for `send_some`, `receive_some`."""
        self._socket.setblocking(blocks)

    def send(self, views: Sequence[memoryview]) -> None:
        """Sends all of several pieces of memory. Raises `OSError` where the connection is gone."""
        if self._tls is not None:
            for view in views:
                self._tls.sendall(view)
            return
        while views:
            sent = self._socket.sendmsg(views[:_MAX_VIEWS])
            views = remaining(views, sent)

    def receive(self, views: Sequence[memoryview], *, ahead: bool = False) -> None:
        """Fills several pieces of memory. Raises `EOFError` where the connection ends before.
        `ahead`: little follows, which may be read with it and kept for the next call."""
        while views:
            if not self._ahead and ahead:
                count = self._socket.recv_into(self._buffer)
                self._ahead = self._buffer[:count]
            if self._ahead:
                count = min(len(self._ahead), len(views[0]))
                views[0][:count] = self._ahead[:count]
                self._ahead = self._ahead[count:]
            elif ahead:
                count = 0  # it has ended
            elif self._tls is not None:
                count = self._tls.recv_into(views[0])
            elif len(views) == 1:
                count = self._socket.recv_into(views[0], 0, _WAIT_ALL)
            else:
                count, *_ = self._socket.recvmsg_into(views[:_MAX_VIEWS], 0, _WAIT_ALL)
            if not count:
                raise EOFError
            views = remaining(views, count)

    def send_some(self, data: bytes | bytearray) -> int:
        """How many bytes could be sent at once. Raises `OSError` where the connection is gone."""
        try:
            return self._socket.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def receive_some(self, most: int) -> bytes | None:
        """What has arrived, None for nothing. Raises `EOFError` where the connection has ended."""
        try:
            data = self._socket.recv(most)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        if not data:
            raise EOFError
        return data

    def give_up_after(self, seconds: float) -> None:
        """Lets the system end the connection where nobody acknowledges its packets for so long,
        and ask whether anybody does where none were sent."""
        seconds = min(seconds, _LONGEST_IDLE)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            for option, value in (
                (socket.TCP_USER_TIMEOUT, int(1000 * seconds)),
                (socket.TCP_KEEPIDLE, max(1, int(seconds))),
                (socket.TCP_KEEPINTVL, 1),
            ):
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def shut(self) -> None:
        """Ends the connection both ways; whoever waits on it is woken."""
        with contextlib.suppress(OSError):
            # Not SSLSocket's, after which a sender in another thread would go on in the clear.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Frees the socket; only when no thread uses it any more."""
        self._socket.close()


def remaining(views: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """What is left of pieces of memory after their first `done` bytes."""
    if done == sum(map(len, views)):  # as nearly always
        return []
    for index, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[index + 1 :]] if done else views[index:]
        done -= len(view)
    return []


def dial(
    host: str, port: int, handshake: Handshake, seconds: float, tls: Tls | None
) -> tuple[Wire, Introduction]:
    """A connection whose handshake is done. Raises `OSError` or `FourfoldError`."""
    deadline = time.monotonic() + seconds
    try:
        connection = socket.create_connection((host, port), timeout=seconds)
    except UnicodeError as error:
        raise ConnectionError(f"{host!r} is no name of a host") from error
    try:
        return _secure(connection, handshake, deadline, tls, server=False)
    except BaseException:
        connection.close()
        raise


def answer(
    connection: socket.socket, handshake: Handshake, seconds: float, tls: Tls | None
) -> tuple[Wire, Introduction]:
    """The listener's side of `dial`. Raises the same; closes what it raises for."""
    try:
        return _secure(connection, handshake, time.monotonic() + seconds, tls, server=True)
    except BaseException:
        connection.close()
        raise


def _secure(
    connection: socket.socket,
    handshake: Handshake,
    deadline: float,
    tls: Tls | None,
    *,
    server: bool,
) -> tuple[Wire, Introduction]:
    _until(connection, deadline)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        context = tls.server if server else tls.client
        # Closes `connection`, whose place it takes, where it fails.
        connection = context.wrap_socket(connection, server_side=server)
    try:
        if tls is not None:
            assert isinstance(connection, ssl.SSLSocket)
            handshake.bind(tls.certificate if server else _shown(connection))
        connection.sendall(handshake.start())
        while not handshake.over:
            _until(connection, deadline)
            data = connection.recv(handshake.wanted)
            if not data:
                raise ForeignError(
                    "the connection ended during the handshake; is TLS switched on at both ends "
                    "or at neither, and are both ends workers of this service?"
                )
            connection.sendall(handshake.feed(data))
        if handshake.error is not None:
            raise handshake.error
        assert handshake.result is not None
        connection.settimeout(None)
        return Wire(connection), handshake.result
    except BaseException:
        connection.close()
        raise


def _shown(connection: ssl.SSLSocket) -> bytes:
    """Hash of the certificate that the listener showed."""
    certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None, "TLS let somebody in without a certificate"
    return hash_certificate(certificate)


def _until(connection: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the handshake took too long")
    connection.settimeout(left)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"the transport cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another address or port"
        ) from error


def _address(connection: socket.socket) -> str:
    try:
        host, port, *_ = connection.getpeername()
    except (OSError, ValueError):
        return "a closed connection"
    return f"{host}:{port}"
