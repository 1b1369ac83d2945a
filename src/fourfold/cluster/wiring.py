"""Connections between gateways and workers, once both sides have proven who they are."""

from __future__ import annotations

import contextlib
import select
import socket
import threading

from fourfold.transport.wire import Wire

_UNSENT = 1 << 20
"""Bytes that a tunnel holds in one direction before it reads no more."""
_AT_ONCE = 1 << 16


def plain_socket(wire: Wire, silence: float, *, secured: bool) -> socket.socket:
    """A socket for the messages of a connection, which takes its place; under TLS (`secured`) it
    leads there through a thread. The system gives the connection up when the other side has not
    acknowledged anything for `silence` seconds."""
    wire.give_up_after(silence)
    if secured:
        ours, theirs = socket.socketpair()
        threading.Thread(target=_tunnel, args=(wire, theirs), name="tls", daemon=True).start()
        return ours
    own = socket.socket(fileno=socket.dup(wire.fileno()))
    wire.close()
    return own


def _tunnel(wire: Wire, inner: socket.socket) -> None:
    """Carries bytes between a connection under TLS, which one thread alone may use, and a plain
    socket, until one of them ends."""
    wire.block(False)
    inner.setblocking(False)
    out, back = bytearray(), bytearray()
    try:
        while True:
            poller = select.poll()  # `select.select` takes no descriptor above 1023
            for end, comes, goes in ((inner, out, back), (wire, back, out)):
                room, held = len(comes) < _UNSENT, bool(goes)
                if room or held:
                    poller.register(end, select.POLLIN * room | select.POLLOUT * held)
            poller.poll(0 if wire.pending and len(back) < _UNSENT else None)
            with contextlib.suppress(BlockingIOError):
                if len(out) < _UNSENT:
                    out += _some(inner)
            if len(back) < _UNSENT:
                back += wire.receive_some(_AT_ONCE) or b""
            if out:
                del out[: wire.send_some(out[:_AT_ONCE])]
            with contextlib.suppress(BlockingIOError):
                if back:
                    del back[: inner.send(back[:_AT_ONCE])]
    except (OSError, EOFError):
        # What had come before the end is heard, as far as there is room for it.
        with contextlib.suppress(OSError):
            inner.send(back)
    finally:
        inner.close()
        wire.shut()
        wire.close()


def _some(inner: socket.socket) -> bytes:
    data = inner.recv(_AT_ONCE)
    if not data:
        raise EOFError
    return data
