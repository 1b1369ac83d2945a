"""A server in a process of its own, for as long as it is measured."""

from __future__ import annotations

import collections
import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from fourfold.errors import FourfoldError

_PROGRAM = (sys.executable, "-c", "from fourfold.cli.main import main; main()")
_READY = re.compile(r" at (http://\S+)/v1 \(ready after")
_READY_SECONDS = 600.0
_END_SECONDS = 60.0
_LAST_LINES = 20


@contextlib.contextmanager
def serving(arguments: Sequence[str]) -> Iterator[str]:
    """Runs `fourfold` with these arguments; its address, once it is ready.

    Raises `FourfoldError` with what the server said last where it does not come up, and where what
    is done meanwhile raises one.
    """
    process = subprocess.Popen([*_PROGRAM, *arguments], stderr=subprocess.PIPE, text=True)
    said: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    address: list[str] = []
    settled = threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if not address and (match := _READY.search(line)):
                address.append(match[1])
                settled.set()
        settled.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        settled.wait(_READY_SECONDS)
        if not address:
            raise FourfoldError("the server did not come up")
        yield address[0]
    except FourfoldError as error:
        raise FourfoldError(f"{error}; the server said last:\n{''.join(said)}") from None
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
