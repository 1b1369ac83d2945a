"""Computing on a thread that ends.

OpenMP keeps threads for each thread that computed. Where it keeps more than there are cores, none
of them waits awake for the next part of a step (libgomp's throttled spinning), and an engine's
steps on a CPU take twice as long: so who computes only once does it here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def on_own_thread(work: Callable[[], _T]) -> _T:
    """Returns or raises what `work` does. An interrupt does not wait for it."""
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result()
