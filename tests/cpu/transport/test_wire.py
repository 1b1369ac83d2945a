"""One connection: what is read ahead is neither lost nor taken twice."""

from __future__ import annotations

import random
import socket
import threading

import pytest

from fourfold.transport.wire import Wire


def test_what_was_read_ahead_is_what_comes_next() -> None:
    ours, theirs = socket.socketpair()
    wire, chance = Wire(ours), random.Random(1)
    data = chance.randbytes(300_000)

    def dribble() -> None:
        at = 0
        while at < len(data):
            step = chance.choice((1, 50, 64, 9000))
            theirs.sendall(data[at : at + step])
            at += step
        theirs.close()

    sender = threading.Thread(target=dribble)
    sender.start()
    received, draw = b"", random.Random(2)
    while len(received) < len(data):
        left = len(data) - len(received)
        most = left // 2 or 1
        sizes = [min(left // 2, draw.choice((0, 500))), min(most, draw.choice((64, 20_000)))]
        views = [memoryview(bytearray(size)) for size in sizes if size]
        wire.receive(views, ahead=draw.random() < 0.5)
        received += b"".join(views)
    assert received == data
    for ahead in (True, False):
        with pytest.raises(EOFError):
            wire.receive([memoryview(bytearray(1))], ahead=ahead)
    sender.join()
    wire.close()
