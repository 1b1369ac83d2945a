"""How long the parts of a start took.

Importing this needs no torch, so that the first part can be what imports it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Phases:
    """Seconds from a process's start to its being ready, by part.

    `started` is when it started, by `time.monotonic`, which all processes of a machine share;
    None: now. What passes outside of any part is told as `other`.
    """

    def __init__(self, started: float | None = None) -> None:
        self._started = time.monotonic() if started is None else started
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Counts what is done meanwhile to a part."""
        begun = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - begun
            self.seconds[part] = self.seconds.get(part, 0.0) + spent

    def ready(self) -> str:
        """One line for the log: `ready after 9.1 s (imports 4.8, weights 2.9, other 1.4)`."""
        whole = time.monotonic() - self._started
        parts = self.seconds | {"other": max(0.0, whole - sum(self.seconds.values()))}
        told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
        return f"ready after {whole:.1f} s ({told})"
