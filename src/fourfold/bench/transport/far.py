"""The receiving process: `python -m fourfold.bench.transport.far`, which does what it reads on the
standard input and answers on the standard output.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from fourfold.bench.answers import take_stdout
from fourfold.bench.transport.config import LAYERS
from fourfold.bench.transport.host_pages import Pages, identity, private_memory, without_checksums
from fourfold.bench.transport.messages import (
    WAIT_SECONDS,
    Answer,
    Command,
    Copy,
    Open,
    OpenDevice,
    Pull,
    Receive,
)
from fourfold.errors import ConfigError
from fourfold.transport import Node, TransportConfig

if TYPE_CHECKING:
    from fourfold.bench.transport.device import FarDevice


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
            self._node = None
        memory = private_memory(LAYERS * command.pages * command.page_bytes)
        self._landing = Pages(command.pages, command.page_bytes, command.run_pages, memory, seed=2)
        try:
            self._node = Node(
                identity("far", 2, command.page_bytes),
                TransportConfig(path=command.path, streams=command.streams),
            )
        except ConfigError as error:
            self._say(Answer(error=str(error)))
            return
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
                stack.enter_context(without_checksums())
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
    Far(sys.stdin.buffer, take_stdout()).run()
