"""Asking a run to end with a checkpoint, as whoever wants its machine back does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STDERR = 2


@contextlib.contextmanager
def asked_by_signals(said: str) -> Iterator[Callable[[], bool]]:
    """While inside, the first SIGTERM or SIGINT only makes what this yields true, and one after it
    does what it did before. A signal that was ignored still is.

    Args:
        said: goes to stderr when the first comes.
    """
    asked = False
    # What was not set from Python, which is None, cannot be set again.
    before = {n: handler for n in _SIGNALS if (handler := signal.getsignal(n)) is not None}
    handled = [n for n, handler in before.items() if handler is not signal.SIG_IGN]

    def restore() -> None:
        for number in handled:
            signal.signal(number, before[number])

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        restore()
        # Not by `sys.stderr`, which whoever was interrupted may be in the midst of.
        os.write(_STDERR, said.encode())

    if threading.current_thread() is not threading.main_thread():
        handled.clear()  # only a main thread can handle signals
    for number in handled:
        signal.signal(number, on_signal)
    try:
        yield lambda: asked
    finally:
        restore()
