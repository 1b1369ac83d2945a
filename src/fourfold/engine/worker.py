"""An engine in a process of its own: `python -m fourfold.engine.worker FD`, FD an open socket.

It ends when it is told to, and at once when the socket closes: an engine that nobody can reach
must not keep a GPU. Signals are its gateway's business, which ends it in good order.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fourfold.engine.building import build_engine
from fourfold.engine.channel import (
    Channel,
    FromEngine,
    Load,
    LoadFailed,
    News,
    Progress,
    Ready,
    Stop,
    ToEngine,
)
from fourfold.engine.messages import Submit, TokenOutput
from fourfold.errors import FourfoldError

if TYPE_CHECKING:
    from fourfold.engine.engine import Engine

_PROGRESS_SECONDS = 0.05
"""Between two reports of progress."""
_STATS_SECONDS = 0.1
"""After which numbers are sent that changed without other news."""
_Emitted = tuple[float, list[TokenOutput]]
"""News with the time at which the engine had the first of it."""
_LOST = 1
"""Exit code when the gateway or the engine's own thread has gone."""


def main() -> None:
    """Serves the gateway at the other end of the socket."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    threading.excepthook = _end_with_thread
    Worker(socket.socket(fileno=int(sys.argv[1]))).run()


class Worker:
    """Builds the engine that it is asked for, and carries messages to it and news from it."""

    def __init__(self, connection: socket.socket) -> None:
        self._channel: Channel[ToEngine] = Channel(connection, ToEngine)
        self._asked: queue.SimpleQueue[Load] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[_Emitted | None] = queue.SimpleQueue()
        self._engine: Engine | None = None

    def run(self) -> None:
        """Returns when the gateway has said that it is over, or when loading has failed."""
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        setup = self._asked.get().setup
        try:
            engine, model = build_engine(setup, self._progress())
        except FourfoldError as error:
            self._send(LoadFailed(type(error).__name__, str(error)))
            return
        # The model lives as long as the process; to look through it for garbage takes longer than
        # many a step.
        gc.collect()
        gc.freeze()
        self._engine = engine
        engine.start(lambda outputs: self._news.put((time.perf_counter(), outputs)))
        self._send(Ready(model, engine.max_context, engine.stats))
        self._tell(engine)
        engine.stop()

    def _listen(self) -> None:
        """Hands on what the gateway says, on a thread of its own, so that its end is noticed even
        while the model is loading."""
        try:
            while True:
                for message in self._channel.receive():
                    self._hear(message)
        except EOFError:
            os._exit(_LOST)

    def _hear(self, message: ToEngine) -> None:
        if isinstance(message, Load):
            self._asked.put(message)
        elif isinstance(message, Stop):
            self._news.put(None)
        else:
            assert self._engine is not None, "requests come after Ready"
            if isinstance(message, Submit):
                self._engine.submit(message)
            else:
                self._engine.abort(message)

    def _progress(self) -> Callable[[int, int], None]:
        due = 0.0

        def tell(done: int, total: int) -> None:
            nonlocal due
            now = time.perf_counter()
            if now >= due or done == total:
                due = now + _PROGRESS_SECONDS
                self._send(Progress(done, total))

        return tell

    def _tell(self, engine: Engine) -> None:
        """Sends what the engine emits and counts, until told to stop."""
        told = engine.stats
        while (news := self._gather()) is not None:
            since, outputs = news
            stats = engine.stats
            if outputs or stats != told:
                self._send(News(outputs, stats, since))
                told = stats

    def _gather(self) -> _Emitted | None:
        """All that was emitted since, as one, so that a gateway which is busy gets fewer, larger
        messages; nothing if nothing was for a while; None when told to stop."""
        try:
            first = self._news.get(timeout=_STATS_SECONDS)
        except queue.Empty:
            return time.perf_counter(), []
        if first is None:
            return None
        since, outputs = first
        while not self._news.empty():
            more = self._news.get()
            if more is None:
                self._news.put(None)
                break
            outputs += more[1]
        return since, outputs

    def _send(self, message: FromEngine) -> None:
        try:
            self._channel.send(message)
        except OSError:
            os._exit(_LOST)


def _end_with_thread(args: threading.ExceptHookArgs) -> None:
    """A thread that fails leaves nobody to answer: better to end, and be noticed."""
    threading.__excepthook__(args)
    os._exit(_LOST)


if __name__ == "__main__":
    main()
