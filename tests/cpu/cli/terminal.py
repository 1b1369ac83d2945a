"""A program at a terminal of its own, driven as a person would."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

MAIN = (sys.executable, "-c", "from fourfold.cli.main import main; main()")
PATIENCE = 60.0


class Terminal:
    """Types to a `fourfold` command and reads what it shows."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*MAIN, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"},
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.shown = b""
        self._seen = 0

    def type(self, text: str | bytes) -> None:
        os.write(self._master, text.encode() if isinstance(text, str) else text)

    def wait_for(self, text: str, *, more: int = 0) -> str:
        """Reads until `text` and `more` bytes were shown; returns what is new."""
        deadline = time.monotonic() + PATIENCE
        wanted = text.encode()
        while True:
            place = self.shown.find(wanted, self._seen)
            if place >= 0 and len(self.shown) >= place + len(wanted) + more:
                new = self.shown[self._seen : place + len(wanted)]
                self._seen = place + len(wanted)
                return new.decode(errors="replace")
            if time.monotonic() > deadline or not self._read():
                raise AssertionError(f"{text!r} was not shown; only {self.shown[-400:]!r}")

    def exit_code(self) -> int:
        while self._read():
            pass
        return self.process.wait(PATIENCE)

    def leave_by(self, key: bytes) -> int:
        """Types `key` at a prompt, again where nothing happens; returns the exit code.

        An interrupt between a prompt's last byte and the read after it is noted by Python but not
        acted on before the next one.
        """
        for _ in range(30):
            self.type(key)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE / 30)
                return self.exit_code()
        raise AssertionError(f"the program goes on; it showed {self.shown[-400:]!r}")

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], PATIENCE)
        if not ready:
            return False
        try:
            data = os.read(self._master, 65_536)
        except OSError:  # the other end is closed
            return False
        self.shown += data
        return bool(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


def _own_terminal() -> None:
    """Makes standard input the terminal that Ctrl-C comes from."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
