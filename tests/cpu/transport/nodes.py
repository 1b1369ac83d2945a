"""What the tests of the transport share: nodes, memory to send from and to land in, and waiting."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence

from fourfold.transport.config import TransportConfig
from fourfold.transport.format import PageFormat
from fourfold.transport.identity import Identity
from fourfold.transport.link import Transfer
from fourfold.transport.node import Node
from fourfold.transport.pieces import Part, Piece

WAIT_SECONDS = 30.0
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
    """A node on the loopback, with `TransportConfig(**options)`."""
    identity = Identity(name=name, epoch=epoch, model="m", pages=PAGES)
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


class Memory:
    """Pages of one transfer in some memory: at a sender, or a landing at a receiver."""

    def __init__(
        self,
        layers: int,
        pages: int,
        page_bytes: int,
        open_bytes: int,
        buffer: memoryview | None = None,
    ) -> None:
        self.layers, self.pages, self.page_bytes, self.open_bytes = (
            layers,
            pages,
            page_bytes,
            open_bytes,
        )
        size = self.size(layers, pages, page_bytes, open_bytes)
        self.buffer = memoryview(bytearray(size)) if buffer is None else buffer[:size]
        self.order = list(range(pages))
        """Where each page lies in its layer."""
        self.asked = 0

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

    def views(self, part: Part, layer: int, first: int, count: int) -> Sequence[memoryview]:
        self.asked += 1
        if layer >= self.layers:
            raise LookupError("no such layer")
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
                yield Piece(
                    Part.PAGES, layer, first, count, self.views(Part.PAGES, layer, first, count)
                )
        if self.open:
            for layer in range(self.layers):
                yield Piece(Part.OPEN, layer, 0, 1, [self.rows(layer)])


def send(sender: Node, receiver: Node, lease: int, source: Memory) -> tuple[Transfer, Outcome]:
    """Writes all of `source` into a lease of `receiver`."""
    outcome = Outcome()
    transfer = sender.link(receiver.peer).begin(lease, outcome)
    transfer.write(list(source.pieces()))
    transfer.finish()
    return transfer, outcome
