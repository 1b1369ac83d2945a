"""The sending process: plain copies and transfers of ours, timed."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import IO, NamedTuple

import msgspec

from fourfold.bench.answers import command_of
from fourfold.bench.transport.config import LAYERS, TransportBenchConfig
from fourfold.bench.transport.host_pages import Pages, identity, private_memory, without_checksums
from fourfold.bench.transport.messages import (
    WAIT_SECONDS,
    Answer,
    Command,
    Copy,
    Open,
    Receive,
)
from fourfold.errors import ConfigError
from fourfold.transport import (
    Link,
    Node,
    Part,
    Peer,
    Piece,
    SharedRegion,
    TransportConfig,
    TransportPath,
)
from fourfold.transport.memory import address_of


class Sample(NamedTuple):
    """One copy: seconds of the clock, and of the CPU on both sides."""

    seconds: float
    near_cpu: float
    far_cpu: float
    hashing: float = 0.0
    """Of those seconds, for pages on a GPU: while they were hashed at the sender."""
    moving: float = 0.0
    """While they were moved and compared at the receiver."""


class FarProcess:
    """The receiving process, as this one sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            command_of("fourfold.bench.transport.far"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._commands: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout

    def tell(self, command: Command) -> None:
        self._commands.write(msgspec.json.encode(command) + b"\n")
        self._commands.flush()

    def hear(self) -> Answer:
        """The next answer. Raises `RuntimeError` where the process has ended, or failed."""
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the receiving process has ended")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error is not None:
            raise RuntimeError(answer.error)
        return answer

    def close(self) -> None:
        self._commands.close()
        self._process.wait(WAIT_SECONDS)


class Near:
    """Sends what the far process receives."""

    def __init__(self, config: TransportBenchConfig, far: FarProcess, run_pages: int) -> None:
        self._config, self._far, self._run_pages = config, far, run_pages
        self._region = SharedRegion(config.bytes)
        _fill(self._region.buffer)
        self._pages = Pages(config.pages, config.page_bytes, run_pages, self._region.buffer, seed=1)
        self._digest = self._pages.digest()
        self._copy: memoryview | None = None
        self._leases = iter(range(1, 1 << 30))

    def sockets(self, streams: int, chunk: int) -> Sample:
        """All bytes over plain sockets, without checksums."""
        length = self._config.bytes // streams * streams
        self._far.tell(Copy(streams=streams, chunk=chunk, length=length))
        port, share = self._far.hear().port, length // streams
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
        threads = [
            threading.Thread(
                target=_give_all,
                args=(each, self._region.buffer[number * share : (number + 1) * share], chunk),
            )
            for number, each in enumerate(connections)
        ]
        with timed() as found:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return Sample(found.seconds, found.cpu, self._far.hear().cpu)

    def memory(self, threads: int) -> Sample:
        """All bytes from one place in memory to another, in one process."""
        if self._copy is None:
            self._copy = private_memory(self._config.bytes)
        share = self._config.bytes // threads
        source, target = self._region.address, address_of(self._copy)
        workers = [
            threading.Thread(
                target=ctypes.memmove, args=(target + n * share, source + n * share, share)
            )
            for n in range(threads)
        ]
        with timed() as found:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        return Sample(found.seconds, found.cpu, 0.0)

    @contextlib.contextmanager
    def link(self, path: TransportPath) -> Iterator[OurLink]:
        """A link to a fresh node of the far process. Raises `ConfigError` where that cannot use the
        path."""
        config = self._config
        self._far.tell(
            Open(
                path=path,
                streams=config.streams,
                pages=config.pages,
                page_bytes=config.page_bytes,
                run_pages=self._run_pages,
            )
        )
        try:
            answer = self._far.hear()
        except RuntimeError as error:
            raise ConfigError(f"{path} cannot be measured: {error}") from error
        peer = msgspec.json.decode(answer.node, type=Peer)
        node = Node(
            identity("near", 1, config.page_bytes),
            TransportConfig(path=path, streams=config.streams),
        )
        node.register(self._region)
        try:
            yield OurLink(node, peer, self)
        finally:
            node.close()

    def transfer(self, through: Link, *, verify: bool) -> Sample:
        """All pages by a link. Raises `RuntimeError` where they are not what was sent."""
        lease = next(self._leases)
        pieces = [
            Piece(Part.PAGES, layer, 0, self._pages.pages, self._views(layer))
            for layer in range(LAYERS)
        ]
        self._far.tell(Receive(lease=lease, verify=verify))
        self._far.hear()
        done: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with contextlib.ExitStack() as stack:
            if not verify:
                stack.enter_context(without_checksums())
            found = stack.enter_context(timed())
            transfer = through.begin(lease, done.put)
            transfer.write(pieces)
            transfer.finish()
            error = done.get(timeout=WAIT_SECONDS)
        if error is not None:
            raise RuntimeError(f"a transfer failed: {error}")
        answer = self._far.hear()
        if answer.digest != self._digest:
            raise RuntimeError("other pages arrived than were sent")
        return Sample(found.seconds, found.cpu, answer.cpu)

    def _views(self, layer: int) -> list[memoryview]:
        return list(self._pages.views(Part.PAGES, layer, 0, self._pages.pages))


class OurLink:
    """A link of ours, to be timed."""

    trusts = True
    """Whether it can do without checksums."""

    def __init__(self, node: Node, peer: Peer, near: Near) -> None:
        self._node, self._near = node, near
        self._link = node.link(peer)
        self.transfer(verify=True)  # it stands now, and memory has been touched

    @property
    def path(self) -> str:
        """The way that pages go."""
        return self._node.stats()[0].path

    def transfer(self, *, verify: bool) -> Sample:
        """All pages, with or without checksums on both sides."""
        return self._near.transfer(self._link, verify=verify)

    def round_trips(self, count: int) -> list[float]:
        """Seconds that messages of 64 bytes took there and back."""
        return self._link.round_trips(count, WAIT_SECONDS)


@dataclasses.dataclass
class _Timed:
    seconds: float = 0.0
    cpu: float = 0.0


@contextlib.contextmanager
def timed() -> Iterator[_Timed]:
    """Yields what holds the seconds of the clock and of the CPU when it is left."""
    found = _Timed()
    start, cpu = time.perf_counter(), time.process_time()
    yield found
    found.seconds, found.cpu = time.perf_counter() - start, time.process_time() - cpu


def _fill(buffer: memoryview) -> None:
    """Numbers that differ from place to place."""
    for at in range(0, len(buffer), 4096):
        part = buffer[at : at + 4096]
        part[:] = at.to_bytes(8, "little").ljust(4096, b"\x5a")[: len(part)]


def _give_all(connection: socket.socket, view: memoryview, chunk: int) -> None:
    # Where the far process has ended, its next answer is missed.
    with connection, contextlib.suppress(ConnectionError):
        for at in range(0, len(view), chunk):
            connection.sendall(view[at : at + chunk])
        connection.recv(1)
