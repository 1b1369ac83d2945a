"""A network between two nodes that can be made to fail."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from fourfold.transport.handshake import Purpose
from fourfold.transport.peer import Peer

_CHUNK = 1 << 16
_BUFFER = 1 << 16
"""Of the proxy's own sockets, so that it holds little of what it has not passed on."""


class Bottleneck:
    """Passes on so many bytes a second, of all connections together: an `alter` of a proxy."""

    def __init__(self, rate: float) -> None:
        self._rate, self._lock, self._due = rate, threading.Lock(), 0.0

    def __call__(self, data: bytes) -> bytes:
        with self._lock:
            self._due = max(self._due, time.monotonic()) + len(data) / self._rate
            due = self._due
        time.sleep(max(0.0, due - time.monotonic()))
        return data


def opens(data: bytes, purpose: Purpose) -> bool:
    """Whether these are the first bytes of a connection for this purpose."""
    return data.startswith(b"4FLD") and data[6] == purpose


class Proxy:
    """Forwards connections to a node until told otherwise."""

    def __init__(self, peer: Peer) -> None:
        self._target = (peer.host, peer.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        # Those that it accepts take it on.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self.peer = msgspec.structs.replace(peer, port=self._listener.getsockname()[1])
        """The node as it is reached through here."""
        self.alter: Callable[[bytes], bytes] = lambda data: data
        """What becomes of bytes on their way to the node."""
        self.alter_back: Callable[[bytes], bytes] = lambda data: data
        """And of those on their way from it."""
        self._forwards = threading.Event()
        self._forwards.set()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def freeze(self) -> None:
        """Forwards nothing any more, and keeps every connection open."""
        self._forwards.clear()

    def cut(self) -> None:
        """Closes every connection."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._forwards.set()
        for thread in self._threads:
            thread.join(10)
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [near, far]
            for source, target, back in ((near, far, False), (far, near, True)):
                thread = threading.Thread(
                    target=self._forward, args=(source, target, back), daemon=True
                )
                thread.start()
                self._threads.append(thread)

    def _forward(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                self._forwards.wait()
                target.sendall(self.alter_back(data) if back else self.alter(data))
        self._forwards.wait()
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
