"""Server-sent events, cut out of whatever packets they arrive in.

An event is stamped with the time its *first* byte arrived: that is when the server spoke, and it
does not move when the rest of the event comes in a later packet.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Event(NamedTuple):
    """The joined `data:` lines of one event, and when it began to arrive (seconds)."""

    data: bytes
    at: float


class EventParser:
    """Feeds on packets, gives complete events. Comments and events without data give nothing."""

    def __init__(self) -> None:
        self._pending = b""
        self._began = 0.0

    @property
    def pending(self) -> bytes:
        """What arrived after the last complete event."""
        return self._pending

    def feed(self, packet: bytes, at: float) -> list[Event]:
        """The events that this packet, which arrived at `at`, completes."""
        if not self._pending:
            packet = packet.lstrip(b"\r\n")
            self._began = at
        self._pending += packet
        events = []
        while blank := _BLANK_LINE.search(self._pending):
            data = _data_of(self._pending[: blank.start()])
            if data is not None:
                events.append(Event(data, self._began))
            self._pending = self._pending[blank.end() :]
            self._began = at
        return events


def _data_of(block: bytes) -> bytes | None:
    values = [
        line[5:].removeprefix(b" ") for line in _LINE_END.split(block) if line.startswith(b"data:")
    ]
    return b"\n".join(values) if values else None
