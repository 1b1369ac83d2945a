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


def on_own_thread(work: Callable[[], _T], interrupt: Callable[[], None] = lambda: None) -> _T:
    """Returns or raises what `work` does. What is raised while it waits, by Ctrl-C, calls
    `interrupt`, upon which the work may end sooner; for its end it waits in any case, because a
    process that ends amid it aborts."""
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run)
    try:
        thread.start()
        return done.result()
    finally:
        if not done.done():
            interrupt()
        if thread.ident is not None:
            thread.join()
