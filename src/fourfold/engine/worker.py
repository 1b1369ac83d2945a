"""An engine in a process of its own: `python -m fourfold.engine.worker FD NAME ROLE`, FD an open
socket.

It ends when it is told to, and at once when the socket closes or the gateway falls silent: an
engine that nobody can reach must not keep a GPU. Signals are its gateway's business, which ends it
in good order. A worker that joined a gateway by itself (`cluster.joining`) drops what it holds
instead, and keeps the engine for the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import gc
import logging
import math
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from fourfold.engine.building import EngineSetup, build_engine
from fourfold.engine.channel import (
    ALIVE_SECONDS,
    Alive,
    Channel,
    FromEngine,
    Hello,
    Leaving,
    Load,
    LoadFailed,
    News,
    Progress,
    Ready,
    Refused,
    Stop,
    ToEngine,
)
from fourfold.engine.messages import (
    Abort,
    Continue,
    Granted,
    HandoverNews,
    Role,
    Submit,
    TokenOutput,
)
from fourfold.engine.placing import place
from fourfold.errors import FourfoldError
from fourfold.transport import Node
from fourfold.transport.config import TransportConfig
from fourfold.transport.identity import Identity

if TYPE_CHECKING:
    from fourfold.engine.engine import Engine

logger = logging.getLogger(__name__)

_MOST_AT_ONCE = 1000
"""News of the engine that go as one message at most."""
_PROGRESS_SECONDS = 0.05
"""Between two reports of progress."""
_STATS_SECONDS = 0.1
"""After which numbers are sent that changed without other news."""
_STEP_SECONDS = 300.0
"""A step that takes longer hangs; better to end, and be started again."""
_LOST = 1
"""Exit code when the gateway or the engine's own thread has gone, or hangs."""


class End(enum.Enum):
    """Why a connection to a gateway is over."""

    STOPPED = "stopped"
    """It said so."""
    LOST = "lost"
    REFUSED = "refused"
    """It does not take this worker."""


class _Leave(enum.Enum):
    """The worker was asked to end."""

    LEAVE = 0


_News = list[TokenOutput] | HandoverNews
_Item = tuple[float, _News] | tuple["_Link", End] | _Leave
"""News with the time at which the engine had it, or what else there is to do."""


def main() -> None:
    """Serves the gateway at the other end of the socket."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    descriptor, name, role = sys.argv[1:]
    worker = Worker(Hello(name, Role(role), os.getpid()))

    def leave_at_once(end: End) -> None:
        if end is End.LOST or not worker.ready:
            os._exit(0 if end is End.STOPPED else _LOST)

    worker.serve(socket.socket(fileno=int(descriptor)), leave_at_once)
    worker.close()


class Worker:
    """Builds the engine that it is asked for, once, and carries messages to it and news from it.

    Serves one gateway after the other, from one thread; `leave` may be called by a signal handler.
    """

    def __init__(
        self,
        hello: Hello,
        transport: TransportConfig | None = None,
        choose: Callable[[EngineSetup], EngineSetup] = lambda setup: setup,
    ) -> None:
        """`transport` is the gateway's to say if it is None, and `choose` makes the setup that is
        built here of the gateway's."""
        threading.excepthook = _end_with_thread
        self.refusal: Refused | LoadFailed | None = None
        """Why the last gateway did not take it, or what could not be built."""
        self._hello = hello
        self._transport = transport
        self._choose = choose
        self._news: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._node: Node | None = None
        self._ready: Ready | None = None

    @property
    def ready(self) -> bool:
        """Whether the engine is there."""
        return self._ready is not None

    def serve(
        self, connection: socket.socket, on_end: Callable[[End], None] = lambda end: None
    ) -> End:
        """Serves the gateway at the other end until one of both ends it, then closes the socket
        and drops what is left. `on_end` is called at once, by another thread."""
        self.refusal = None
        link = _Link(connection, self._news.put, on_end)
        with connection:
            link.send(self._hello)
            threading.Thread(target=link.listen, args=(self._hear,), daemon=True).start()
            end = self._load(link) or self._tell(link)
            if isinstance(link.refusal, Refused):
                self.refusal = link.refusal
            link.close()
        if self._engine is not None:
            self._engine.abort_all()
        return end

    def leave(self) -> None:
        """Asks the gateway to take back what is here, once it is ready."""
        self._news.put(_Leave.LEAVE)

    def close(self) -> None:
        """Ends the engine, after the step that runs."""
        if self._engine is not None:
            self._engine.stop()
        if self._node is not None:
            self._node.close()

    def _load(self, link: _Link) -> End | None:
        """Builds the engine, unless it is there, and says so; or how the connection ended."""
        _import_engine()
        load = link.loads.get()
        if isinstance(load, End):
            return load
        if self._engine is None:
            try:
                self._build(load, link)
            except FourfoldError as error:
                self.refusal = LoadFailed(type(error).__name__, str(error))
                link.send(self.refusal)
                return End.REFUSED
        assert self._ready is not None
        assert self._engine is not None
        link.send(msgspec.structs.replace(self._ready, stats=self._engine.stats))
        return None

    def _build(self, load: Load, link: _Link) -> None:
        setup = self._choose(load.setup)
        if load.workers > 1:
            setup = place(setup, load.ordinal, load.workers)
        has_neighbours = load.workers > 1 or self._transport is not None
        setup = dataclasses.replace(setup, share_pages=has_neighbours)
        engine, facts = build_engine(setup, _progress(link))
        identity = Identity(
            name=self._hello.name,
            epoch=secrets.randbits(63),
            model=facts.fingerprint,
            pages=engine.page_format,
            device=engine.device_pages,
        )
        self._node = Node(identity, self._transport or load.transport or TransportConfig())
        engine.connect(self._node)
        engine.on_device_lost = _end_without_device
        gc.collect()  # the engine freezes what is there by then

        def put(news: _News) -> None:
            self._news.put((time.perf_counter(), news))

        engine.start(put, put, alone=True)
        self._engine = engine
        self._ready = Ready(
            facts,
            engine.max_context,
            engine.stats,
            self._node.peer,
            str(engine.device),
        )

    def _hear(self, message: Submit | Abort | Granted | Continue) -> None:
        engine = self._engine
        assert engine is not None, "requests come after Ready"
        match message:
            case Submit():
                engine.submit(message)
            case Abort():
                engine.abort(message)
            case _:
                engine.relay(message)

    def _tell(self, link: _Link) -> End:
        """Sends what the engine emits and counts, until told to stop; how the connection ended."""
        engine = self._engine
        assert engine is not None
        told, told_at = engine.stats, time.monotonic()
        while True:
            outputs: list[TokenOutput] = []
            handover: list[HandoverNews] = []
            since, end = math.inf, None
            for item in self._gather():
                match item:
                    case _Leave.LEAVE:
                        link.send(Leaving())
                    case (_Link() as other, End() as ending):
                        end = ending if other is link else end
                    case (float() as time_had, list() as made):
                        since = min(since, time_had)
                        outputs += made
                    case (float() as time_had, said):
                        since = min(since, time_had)
                        handover.append(said)
            if engine.turn_seconds > _STEP_SECONDS:
                logger.critical("a step takes over %g seconds: the worker ends", _STEP_SECONDS)
                os._exit(_LOST)
            stats, now = engine.stats, time.monotonic()
            due = now - told_at >= ALIVE_SECONDS
            if outputs or handover or stats != told or due:
                since = min(since, time.perf_counter())
                paths = self._node.stats() if due and self._node is not None else None
                link.send(News(outputs, stats, since, handover, paths))
                told, told_at = stats, now if due else told_at
            if end is not None:
                return end

    def _gather(self) -> list[_Item]:
        """All that there is, as one, so that a gateway which is busy gets fewer, larger messages;
        nothing if nothing was for a while."""
        try:
            items = [self._news.get(timeout=_STATS_SECONDS)]
        except queue.Empty:
            return []
        while len(items) < _MOST_AT_ONCE and not self._news.empty():
            items.append(self._news.get())
        return items


class _Link:
    """The connection to one gateway."""

    def __init__(
        self,
        connection: socket.socket,
        put: Callable[[tuple[_Link, End]], None],
        on_end: Callable[[End], None],
    ) -> None:
        self.loads: queue.SimpleQueue[Load | End] = queue.SimpleQueue()
        """What is to be built, or why there is nothing to build."""
        self.refusal: Refused | None = None
        self._connection = connection
        self._channel: Channel[ToEngine] = Channel(connection, ToEngine)
        self._put = put
        self._on_end = on_end
        self._timeout: float | None = None

    def send(self, message: FromEngine) -> None:
        """Waits until there is room. Where nobody listens the connection ends."""
        try:
            self._channel.send(message)
        except OSError:
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def listen(self, hear: Callable[[Submit | Abort | Granted | Continue], None]) -> None:
        """Hands on what the gateway says, on a thread of its own, so that its end is noticed even
        while the model is loading."""
        end = self._listen(hear)
        self._on_end(end)
        self.loads.put(end)
        self._put((self, end))

    def _listen(self, hear: Callable[[Submit | Abort | Granted | Continue], None]) -> End:
        try:
            while True:
                for message in self._channel.receive():
                    match message:
                        case Load():
                            self._timeout = message.timeout
                            self.loads.put(message)
                        case Alive():
                            # From now on it says so all the time.
                            self._connection.settimeout(self._timeout)
                        case Stop():
                            return End.STOPPED
                        case Refused():
                            self.refusal = message
                            return End.REFUSED
                        case _:
                            hear(message)
        except (EOFError, TimeoutError):
            return End.LOST
        except (ValueError, msgspec.MsgspecError) as error:
            logger.error("the gateway sent what is no message (%s)", error)
            return End.LOST


def _import_engine() -> None:
    """Imports what every engine is built with, torch above all, while the gateway's answer is on
    its way: that takes seconds, and no device is touched."""
    gc.disable()  # all of it stays: to look through it again and again is a sixth of the time
    try:
        import fourfold.engine.engine
        import fourfold.engine.runner
        import fourfold.models.loading  # noqa: F401
    finally:
        gc.enable()


def _progress(link: _Link) -> Callable[[int, int], None]:
    due = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal due
        now = time.perf_counter()
        if now >= due or done == total:
            due = now + _PROGRESS_SECONDS
            link.send(Progress(done, total))

    return tell


def _end_without_device() -> None:
    """A worker that fails all it is given draws more: better to end, so that all goes on elsewhere,
    and be started again."""
    logger.critical("the device computes nothing any more: the worker ends")
    os._exit(_LOST)


def _end_with_thread(args: threading.ExceptHookArgs) -> None:
    """A thread that fails leaves nobody to answer: better to end, and be noticed."""
    threading.__excepthook__(args)
    os._exit(_LOST)


if __name__ == "__main__":
    main()
