"""One thread that calls back, so that callers of the transport never meet its locks."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Notifier:
    """Calls what it is given, in order, in its own thread."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        """Has `call` called soon."""
        self._calls.put(call)

    def close(self, seconds: float) -> None:
        """Ends the thread after what it was given; waits so long for it unless it is the caller."""
        self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception:
                logger.exception("a callback of the transport failed")
