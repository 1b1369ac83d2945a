"""A network that can be made to fail: relays between workers, and between them and the gateway.

All relays of a run share one thread with a loop of its own, so that they go on forwarding while the
gateway's loop stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from fourfold.transport.frames import EXTENT_BYTES, HEADER_BYTES, FrameError, decode_header
from fourfold.transport.handshake import Purpose

_READ_BYTES = 1 << 16
_HELLO_BYTES, _PROOF_BYTES, _LENGTH_BYTES = 56, 32, 4
_HANDSHAKE_BYTES = 1024
"""Within which a handshake is over."""
_PURPOSE = slice(6, 8)
_MAX_PAYLOAD = 8 << 20
_MOST_TROUBLES = 4
_HOLD_SECONDS = 0.05
"""For which a frame waits for another one to be swapped with."""

Direction = Literal["in", "out"]
"""To the address that a relay stands for, or back from it."""
Trouble = Literal["flip", "duplicate", "swap", "tear", "drop"]
"""What may happen to one frame of pages: `tear` cuts its connection amid the frame."""


class Network:
    """The thread that all relays run in."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs something there and waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def call(self, work: Callable[[], object]) -> None:
        """Calls something there, soon."""
        self.loop.call_soon_threadsafe(work)

    def close(self) -> None:
        self.run(_cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class Relay:
    """Stands for one address; forwards connections to another until told otherwise."""

    def __init__(
        self,
        network: Network,
        target: tuple[str, int],
        rng: random.Random,
        host: str = "127.0.0.1",
    ) -> None:
        self._network, self._rng = network, rng
        self.target = target
        self.on_frame: Callable[[Trouble | None], None] = lambda trouble: None
        """Called in the network's thread for each frame of pages, with what happens to it."""
        self.frames = 0
        """Of pages, since it began."""
        self._troubles: list[Trouble] = []
        self._gates: dict[Direction, asyncio.Event] = {}
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._delay, self._flips = 0.0, False
        listening = socket.create_server((host, 0))
        self.port: int = listening.getsockname()[1]
        self._server: asyncio.Server = network.run(self._listen(listening))

    def cut(self) -> None:
        """Resets every connection, wherever it is in what it says."""
        self._network.call(self._cut)

    def mute(self, *directions: Direction) -> None:
        """Forwards nothing more that way, and keeps every connection open."""
        for direction in directions:
            self._network.call(self._gates[direction].clear)

    def heal(self) -> None:
        """Forwards everything again, at full speed, what waited first."""
        self._delay = 0.0
        for gate in self._gates.values():
            self._network.call(gate.set)

    def flip(self) -> None:
        """Alters one bit of what is forwarded next, either way; no handshake's, for whoever fails
        that may not come again."""
        self._flips = True

    def slow(self, seconds: float) -> None:
        """Takes that long over each piece of data."""
        self._delay = seconds

    def trouble(self, trouble: Trouble) -> None:
        """Does something to a frame of pages, the next that comes; few of them wait."""
        if len(self._troubles) < _MOST_TROUBLES:
            self._network.call(lambda: self._troubles.append(trouble))

    def close(self) -> None:
        self._network.run(self._close())

    async def _listen(self, listening: socket.socket) -> asyncio.Server:
        self._gates = {"in": asyncio.Event(), "out": asyncio.Event()}
        for gate in self._gates.values():
            gate.set()
        return await asyncio.start_server(self._relay, sock=listening)

    async def _close(self) -> None:
        self._server.close()
        self._cut()

    def _cut(self) -> None:
        for pair in self._pairs:
            for writer in pair:
                writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        pair = writer, far_writer
        self._pairs.add(pair)
        try:
            await asyncio.gather(
                self._forward(reader, far_writer, "in"), self._forward(far_reader, writer, "out")
            )
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._pairs.discard(pair)
            for each in pair:
                each.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        if direction == "in" and await self._introduce(reader, writer) is Purpose.STREAM:
            await self._forward_frames(reader, writer)
        else:
            passed = 0
            while data := await reader.read(_READ_BYTES):
                passed += len(data)
                if self._flips and passed > _HANDSHAKE_BYTES:
                    self._flips = False
                    data = self._flipped(data, 0)
                await self._pass(writer, data, direction)
        writer.write_eof()

    async def _introduce(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Purpose | None:
        """Forwards the dialler's side of a handshake; what the connection is for."""
        try:
            hello = await reader.readexactly(_HELLO_BYTES)
        except asyncio.IncompleteReadError as error:
            hello = error.partial
        await self._pass(writer, hello, "in")
        try:
            purpose = Purpose(int.from_bytes(hello[_PURPOSE], "little"))
        except ValueError:
            return None
        if purpose is not Purpose.STREAM:
            return purpose
        length = b""
        for size in (_PROOF_BYTES, _LENGTH_BYTES):
            length = await reader.readexactly(size)
            await self._pass(writer, length, "in")
        identity = await reader.readexactly(int.from_bytes(length, "little"))
        await self._pass(writer, identity, "in")
        return purpose

    async def _forward_frames(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        held = b""
        while True:
            reading = asyncio.ensure_future(_read_frame(reader))
            if held:
                await asyncio.wait([reading], timeout=_HOLD_SECONDS)
                if not reading.done():
                    await self._pass(writer, held, "in")
                    held = b""
            frame = await reading
            self.frames += 1
            trouble = self._troubles.pop(0) if self._troubles else None
            self.on_frame(trouble)
            if trouble == "swap" and not held:
                held = frame
                continue
            await self._pass(writer, self._spoil(frame, trouble), "in")
            if trouble == "tear":
                raise ConnectionResetError
            if held:
                await self._pass(writer, held, "in")
                held = b""

    def _spoil(self, frame: bytes, trouble: Trouble | None) -> bytes:
        match trouble:
            case "flip":
                # Half of them in the payload, or in the list of where it lies.
                return self._flipped(frame, HEADER_BYTES if self._rng.random() < 0.5 else 0)
            case "duplicate":
                return frame + frame
            case "tear":
                return frame[: self._rng.randrange(1, len(frame))]
            case "drop":
                return b""
            case _:
                return frame

    def _flipped(self, data: bytes, first: int) -> bytes:
        altered = bytearray(data)
        altered[self._rng.randrange(first, len(data))] ^= 1 << self._rng.randrange(8)
        return bytes(altered)

    async def _pass(self, writer: asyncio.StreamWriter, data: bytes, direction: Direction) -> None:
        if self._delay:
            await asyncio.sleep(self._delay)
        await self._gates[direction].wait()
        writer.write(data)
        await writer.drain()


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(HEADER_BYTES)
    try:
        header = decode_header(head, _MAX_PAYLOAD)
    except FrameError as error:
        raise AssertionError(f"a worker sent a frame that is none: {error}") from None
    size = header.extents * EXTENT_BYTES or header.length
    return head + await reader.readexactly(size)


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
