"""The receiving process: `python -m fourfold.bench.transport.far`, which does what it reads.

Commands come as lines of JSON on the standard input; answers go to the standard output.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO
from unittest import mock

import msgspec

from fourfold.bench.transport.config import LAYERS
from fourfold.transport import (
    Identity,
    Node,
    PageFormat,
    Part,
    TransportConfig,
    TransportPath,
)
from fourfold.transport.frames import checksum

if TYPE_CHECKING:
    from fourfold.bench.transport.device import FarDevice

WAIT_SECONDS = 60.0


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Receive `length` bytes over so many plain sockets, `chunk` at a time."""

    streams: int
    chunk: int
    length: int


class Open(msgspec.Struct, frozen=True, tag=True):
    """Make memory and a node that takes pages by a path."""

    path: TransportPath
    streams: int | None
    pages: int
    page_bytes: int
    run_pages: int


class Receive(msgspec.Struct, frozen=True, tag=True):
    """Expect pages for a lease, with or without looking at their checksums."""

    lease: int
    verify: bool


class OpenDevice(msgspec.Struct, frozen=True, tag=True):
    """Make pages on the GPU, map those of the other side, and make a node to pull them."""

    pages: int
    page_bytes: int
    run_pages: int
    streams: int | None
    node: bytes
    """The other side's `Peer`, as JSON."""


class Pull(msgspec.Struct, frozen=True, tag=True):
    """Expect pages on the GPU for a lease."""

    lease: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command, as far as it has a field here."""

    port: int = 0
    node: bytes = b""
    """The node's `Peer`, as JSON."""
    cpu: float = 0.0
    """Seconds of this process."""
    error: str | None = None
    digest: int = 0
    """Checksum of all pages in their order."""
    moving: float = 0.0
    """Seconds for which pages of a GPU were moved and compared."""


Command = Copy | Open | Receive | OpenDevice | Pull


class Pages:
    """Pages of all layers: what is sent, and where it lands. Runs of `run_pages` pages lie one
    after the other, the runs in random order."""

    layers = LAYERS
    open = False

    def __init__(
        self, pages: int, page_bytes: int, run_pages: int, buffer: memoryview, seed: int
    ) -> None:
        self.pages = pages
        self._buffer, self._page_bytes = buffer, page_bytes
        count = len(buffer) // page_bytes
        runs = [range(at, min(at + run_pages, count)) for at in range(0, count, run_pages)]
        random.Random(seed).shuffle(runs)
        self._order = [page for run in runs for page in run]

    def landed(self, part: Part, layer: int, layers: int, first: int, count: int) -> None:
        """Nothing more is to be done with a run."""

    def views(self, part: Part, layer: int, first: int, count: int) -> Sequence[memoryview]:
        """See `Landing`. Neighbours in memory are one piece, as in an engine."""
        start = layer * self.pages + first
        return self._pieces(self._order[start : start + count])

    def digest(self) -> int:
        """Checksum of all pages in their order."""
        return checksum(self._pieces(self._order))

    def _pieces(self, order: Sequence[int]) -> list[memoryview]:
        found, size = [], self._page_bytes
        begin = end = order[0]
        for page in [*order, -1]:
            if page != end:
                found.append(self._buffer[begin * size : end * size])
                begin = page
            end = page + 1
        return found


def identity(name: str, epoch: int, page_bytes: int) -> Identity:
    """Who a side of the benchmark says it is."""
    pages = PageFormat(
        layers=LAYERS,
        kv_heads=1,
        head_width=1,
        page_tokens=64,
        code="int8",
        open_code="bfloat16",
        record_bytes=page_bytes,
    )
    return Identity(name=name, epoch=epoch, model="benchmark", pages=pages)


def private_memory(size: int) -> memoryview:
    """Memory of this process that has been touched."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, mmap.PAGESIZE):
        memory[at] = 1
    return memoryview(memory)


@contextlib.contextmanager
def without_checksums(module: str) -> Iterator[None]:
    """A module of the transport takes every checksum for 0: only to see what they cost."""
    with mock.patch(f"{module}.checksum", return_value=0):
        yield


class Far:
    """Does the commands."""

    def __init__(self, commands: BinaryIO, answers: BinaryIO) -> None:
        self._commands, self._answers = commands, answers
        self._memory: memoryview | None = None
        self._landing: Pages | None = None
        self._node: Node | None = None
        self._device: FarDevice | None = None

    def run(self) -> None:
        """Until there are no more."""
        decoder = msgspec.json.Decoder(Command)
        for line in self._commands:
            command = decoder.decode(line)
            match command:
                case Copy():
                    self._copy(command)
                case Open():
                    self._open(command)
                case Receive():
                    self._receive(command)
                case OpenDevice():
                    self._open_device(command)
                case Pull():
                    assert self._device is not None
                    self._device.pull(command, self._say)

    def _say(self, answer: Answer) -> None:
        self._answers.write(msgspec.json.encode(answer) + b"\n")
        self._answers.flush()

    def _copy(self, command: Copy) -> None:
        if self._memory is None or len(self._memory) != command.length:
            self._memory = private_memory(command.length)
        share = command.length // command.streams
        with socket.create_server(("127.0.0.1", 0), backlog=command.streams) as listener:
            listener.settimeout(WAIT_SECONDS)
            self._say(Answer(port=listener.getsockname()[1]))
            sockets = [listener.accept()[0] for _ in range(command.streams)]
        views = [self._memory[n * share : (n + 1) * share] for n in range(command.streams)]
        start = time.process_time()
        threads = [
            threading.Thread(target=_take_all, args=(each, view, command.chunk))
            for each, view in zip(sockets, views, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._say(Answer(cpu=time.process_time() - start))

    def _open(self, command: Open) -> None:
        if self._node is not None:
            self._node.close()
        memory = private_memory(LAYERS * command.pages * command.page_bytes)
        self._landing = Pages(command.pages, command.page_bytes, command.run_pages, memory, seed=2)
        self._node = Node(
            identity("far", 2, command.page_bytes),
            TransportConfig(path=command.path, streams=command.streams),
        )
        self._say(Answer(node=msgspec.json.encode(self._node.peer)))

    def _open_device(self, command: OpenDevice) -> None:
        from fourfold.bench.transport.device import open_far  # PyTorch, for this path alone

        if self._device is not None:
            self._device.close()
        opened = open_far(command)
        if isinstance(opened, str):
            self._device = None
            self._say(Answer(error=opened))
            return
        self._device = opened
        self._say(Answer(node=opened.node))

    def _receive(self, command: Receive) -> None:
        assert self._node is not None
        assert self._landing is not None
        done: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with contextlib.ExitStack() as stack:
            if not command.verify:
                stack.enter_context(without_checksums("fourfold.transport.session"))
            self._node.expect(command.lease, 1, self._landing, done.put)
            self._say(Answer())
            start = time.process_time()
            error = done.get(timeout=WAIT_SECONDS)
            cpu = time.process_time() - start
        self._node.forget(command.lease)
        self._say(Answer(cpu=cpu, error=error, digest=self._landing.digest()))


def _take_all(connection: socket.socket, view: memoryview, chunk: int) -> None:
    with connection:
        while view:
            count = connection.recv_into(view[:chunk])
            if not count:
                raise EOFError
            view = view[count:]
        connection.sendall(b"k")


if __name__ == "__main__":
    Far(sys.stdin.buffer, sys.stdout.buffer).run()
