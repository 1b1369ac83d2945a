"""Connections between gateways and workers, once both have proven who they are."""

from __future__ import annotations

import socket
import sys

from fourfold.transport.wire import Wire


def plain_socket(wire: Wire, silence: float) -> socket.socket:
    """The socket of a connection without TLS, which takes its place. The system gives it up when
    the other side has not acknowledged anything for `silence` seconds."""
    own = socket.socket(fileno=socket.dup(wire.fileno()))
    wire.close()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * silence))
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(silence)))
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    return own
