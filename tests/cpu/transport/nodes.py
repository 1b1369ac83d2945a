"""What the tests of the transport share: nodes, memory to send from and to land in, and waiting."""

from __future__ import annotations

import importlib.util
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import pytest

from fourfold.transport import (
    Identity,
    Node,
    PageFormat,
    Part,
    Piece,
    SharedRegion,
    Transfer,
    TransportConfig,
    TransportPath,
)

WAIT_SECONDS = 30.0
ARENA_BYTES = 48 << 20
PAGES = PageFormat(
    layers=4,
    kv_heads=2,
    head_width=64,
    page_tokens=64,
    code="int8",
    open_code="bfloat16",
    record_bytes=16400,
)


def make_node(name: str, epoch: int = 1, **options: object) -> Node:
    """A node on the loopback, with `TransportConfig(**options)`; patient, for tests share cores."""
    identity = Identity(name=name, epoch=epoch, model="m", pages=PAGES)
    options = {"stall_seconds": 20.0, "streams": 2, **options}
    return Node(identity, TransportConfig(**options))  # type: ignore[arg-type]


class Outcome:
    """A `done` callback that can be waited for; it notes each call."""

    def __init__(self) -> None:
        self.calls: list[str | None] = []
        self._called = threading.Event()

    def __call__(self, reason: str | None) -> None:
        self.calls.append(reason)
        self._called.set()

    def wait(self) -> str | None:
        """What it was first called with."""
        assert self._called.wait(WAIT_SECONDS), "done was not called"
        return self.calls[0]

    def failure(self) -> str:
        """Why it failed."""
        reason = self.wait()
        assert reason is not None, "it did not fail"
        return reason


class Memory:
    """Pages of one transfer in some memory: at a sender, or a landing at a receiver."""

    def __init__(
        self,
        layers: int,
        pages: int,
        page_bytes: int,
        open_bytes: int = 0,
        buffer: memoryview | None = None,
    ) -> None:
        self.layers, self.pages = layers, pages
        self.page_bytes, self.open_bytes = page_bytes, open_bytes
        size = self.size(layers, pages, page_bytes, open_bytes)
        self.buffer = memoryview(bytearray(size)) if buffer is None else buffer[:size]
        self.order = list(range(pages))
        """Where each page lies in its layer."""

    @staticmethod
    def size(layers: int, pages: int, page_bytes: int, open_bytes: int) -> int:
        return layers * (pages * page_bytes + open_bytes)

    @property
    def open(self) -> bool:
        return self.open_bytes > 0

    def page(self, layer: int, page: int) -> memoryview:
        stride = self.pages * self.page_bytes + self.open_bytes
        start = layer * stride + self.order[page] * self.page_bytes
        return self.buffer[start : start + self.page_bytes]

    def rows(self, layer: int) -> memoryview:
        stride = self.pages * self.page_bytes + self.open_bytes
        start = layer * stride + self.pages * self.page_bytes
        return self.buffer[start : start + self.open_bytes]

    def landed(self, part: Part, layer: int, layers: int, first: int, count: int) -> int:
        """Nothing more is to be done with a run, which is pages."""
        return 0

    def views(self, part: Part, layer: int, first: int, count: int) -> Sequence[memoryview]:
        if part is Part.OPEN:
            return [self.rows(layer)]
        return [self.page(layer, page) for page in range(first, first + count)]

    def content(self) -> list[bytes]:
        """All of it in the order of layers and pages, wherever it lies."""
        pages = [bytes(self.page(a, b)) for a in range(self.layers) for b in range(self.pages)]
        return pages + [bytes(self.rows(layer)) for layer in range(self.layers)]

    def fill(self, seed: int) -> Memory:
        """The same with other bytes in it, the same for each seed."""
        self.buffer[:] = random.Random(seed).randbytes(len(self.buffer))
        return self

    def shuffle(self, seed: int) -> Memory:
        """The same with its pages elsewhere."""
        random.Random(seed).shuffle(self.order)
        return self

    def pieces(self, run: int = 1 << 30) -> Iterator[Piece]:
        """All of it, in runs of so many pages at most."""
        for layer in range(self.layers):
            for first in range(0, self.pages, run):
                count = min(run, self.pages - first)
                data = self.views(Part.PAGES, layer, first, count)
                yield Piece(Part.PAGES, layer, first, count, data)
        if self.open:
            for layer in range(self.layers):
                yield Piece(Part.OPEN, layer, 0, 1, [self.rows(layer)])


class Way(NamedTuple):
    """A path, the transports that UCX may use for it, and how many streams share the work."""

    path: TransportPath
    ucx: str = ""
    streams: int = 2

    @property
    def described(self) -> str:
        """What figures call it."""
        if self.path is TransportPath.RDMA:
            return f"rdma (ucx, UCX_TLS={self.ucx})"
        return f"tcp x{self.streams}" if self.path is TransportPath.TCP else "shared memory"


needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None,
    reason="NIXL is not installed; make check-rdma installs it",
)
RDMA_WAYS = [
    # By software of both sides, and by the reader alone, as a device for RDMA does.
    pytest.param(Way(TransportPath.RDMA, "tcp"), id="rdma-tcp", marks=needs_nixl),
    pytest.param(Way(TransportPath.RDMA, "tcp,cma"), id="rdma-cma", marks=needs_nixl),
]
WAYS = [
    pytest.param(Way(TransportPath.TCP), id="tcp"),
    pytest.param(Way(TransportPath.SHARED_MEMORY), id="shared-memory"),
    *RDMA_WAYS,
]
GATHERING_WAYS = [
    # With more than two streams small pieces are brought together before they are dealt with.
    pytest.param(Way(TransportPath.TCP, streams=4), id="tcp-gathering"),
    pytest.param(Way(TransportPath.SHARED_MEMORY, streams=4), id="shared-memory-gathering"),
]


class Pair:
    """A sender and a receiver, whose pages go by a certain way."""

    def __init__(self, way: Way, **options: object) -> None:
        self.way, path = way, way.path
        options = {"streams": way.streams, **options}
        self._environment = mock.patch.dict(os.environ, {"UCX_TLS": way.ucx} if way.ucx else {})
        self._environment.start()  # heard when nodes are made, and when they link
        self.sender = make_node("prefill", 1, path=path, **options)
        self.receiver = make_node("decode", 2, path=path, **options)
        self._arena: SharedRegion | None = None
        self._used = 0
        if path is not TransportPath.TCP:
            self._arena = SharedRegion(ARENA_BYTES)
            self.sender.register(self._arena)

    def memory(self, layers: int, pages: int, page_bytes: int, open_bytes: int = 0) -> Memory:
        """Memory at the sender, whose pages can go by the path."""
        if self._arena is None:
            return Memory(layers, pages, page_bytes, open_bytes)
        buffer = self._arena.buffer[self._used :]
        self._used += Memory.size(layers, pages, page_bytes, open_bytes)
        return Memory(layers, pages, page_bytes, open_bytes, buffer)

    def reuse(self) -> None:
        """What memory was made of may be taken again."""
        self._used = 0

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self._environment.stop()


def until(condition: Callable[[], object]) -> None:
    """Waits for something that other threads do."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)


def send(sender: Node, receiver: Node, lease: int, source: Memory) -> tuple[Transfer, Outcome]:
    """Writes all of `source` into a lease of `receiver`."""
    outcome = Outcome()
    transfer = sender.link(receiver.peer).begin(lease, outcome)
    transfer.write(list(source.pieces()))
    transfer.finish()
    return transfer, outcome


def forget(node: Node, lease: int) -> None:
    """Closes a lease, and waits until nobody writes into its memory."""
    left = threading.Event()
    assert node.forget(lease, left.set) or left.wait(WAIT_SECONDS)


def cancel(transfer: Transfer) -> None:
    """Gives a transfer up, and waits until nobody reads its pieces."""
    left = threading.Event()
    assert transfer.cancel(left.set) or left.wait(WAIT_SECONDS)


def works(receiver: Node) -> None:
    """A good peer is still served."""
    sender = make_node("good", 77)
    source, target, arrived = Memory(2, 5, 1000).fill(9), Memory(2, 5, 1000), Outcome()
    receiver.expect(2**40, 77, target, arrived)
    assert send(sender, receiver, 2**40, source)[1].wait() is None
    assert arrived.wait() is None
    assert target.content() == source.content()
    receiver.forget(2**40)
    sender.close()
