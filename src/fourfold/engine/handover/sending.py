"""Sending the pages of prompts while they are computed, on a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fourfold.engine.handover.pages import Outlet, Prompt, records_of, rows_of
from fourfold.quadrants.kv_pages import PAGE_TOKENS
from fourfold.transport.format import PageFormat
from fourfold.transport.link import Transfer
from fourfold.transport.pieces import Part, Piece

logger = logging.getLogger(__name__)

_AT_ONCE = 1 << 20
"""Bytes up to which a prompt is sent as one when it is computed; above, layer after layer."""


class Route(NamedTuple):
    """Where a prompt goes, once its receiver has granted pages."""

    transfer: Transfer
    outlet: Outlet
    theirs: PageFormat
    found: int
    """Pages that the receiver had already."""


class Sending:
    """One prompt on its way; what is computed before the receiver has granted pages waits here."""

    def __init__(self, prompt: Prompt, layers: int, failed: Callable[[str], None]) -> None:
        """`failed` is called with the reason, by the thread that advances it, where pages cannot be
        read or converted."""
        self._prompt = prompt
        self._failed = failed
        self._stored = [0] * layers
        self._sent = [0] * layers
        self._unsent = set(range(layers))
        self._route: Route | None = None
        self._over = False
        self._lock = threading.Lock()

    def begin(self, route: Route) -> None:
        """The receiver holds pages now."""
        with self._lock:
            self._route = route
            self._sent = [route.found] * len(self._sent)

    def stored(self, layers: Iterable[int], tokens: int) -> None:
        """The first `tokens` tokens are in the pages of these layers."""
        for layer in layers:
            self._stored[layer] = tokens

    def cancel(self, left: Callable[[], None]) -> bool:
        """Gives it up, once. Returns whether nothing reads the pages any more; else `left` is
        called, from a thread of the transport, when that is so."""
        with self._lock:
            self._over = True
            return self._route is None or self._route.transfer.cancel(left)

    def fail(self, error: str) -> None:
        """Reads no more pages and says why, once; it is still to be cancelled."""
        with self._lock:
            if not self._over:
                self._over = True
                self._failed(error)

    def advance(self) -> None:
        """Sends what is computed by now."""
        with self._lock:
            if self._over or self._route is None or not self._unsent:
                return
            pieces = self._ready(self._route)
            if pieces:
                self._route.transfer.write(pieces)
            if not self._unsent:
                self._route.transfer.finish()

    def _ready(self, route: Route) -> list[Piece]:
        stored = list(self._stored)  # it grows meanwhile
        prompt, theirs = self._prompt, route.theirs
        records = records_of(theirs, prompt.tokens) - route.found
        small = len(stored) * records * theirs.record_bytes <= _AT_ONCE
        if small and min(stored) < prompt.tokens:
            return []
        pieces: list[Piece] = []
        due: dict[tuple[int, int, bool], list[int]] = {}
        for layer in sorted(self._unsent):
            last = stored[layer] == prompt.tokens
            end = records_of(theirs, prompt.tokens) if last else stored[layer] // PAGE_TOKENS
            due.setdefault((self._sent[layer], end, last), []).append(layer)
        for (first, end, last), layers in due.items():
            pieces += self._read(route, layers, first, end, last=last)
        return pieces

    def _read(
        self, route: Route, layers: list[int], first: int, end: int, *, last: bool
    ) -> Iterator[Piece]:
        """Records `first : end` of some layers, and the rows after the last."""
        if end > first:
            records = route.outlet.records(layers, self._prompt, first, end - first)
            for layer, data in zip(layers, records, strict=True):
                self._sent[layer] = end
                yield Piece(Part.PAGES, layer, first - route.found, end - first, data)
        if last:
            self._unsent.difference_update(layers)
            if rows_of(route.theirs, self._prompt.tokens):
                rows = route.outlet.rows(layers, self._prompt)
                for layer, data in zip(layers, rows, strict=True):
                    yield Piece(Part.OPEN, layer, 0, 1, data)


class Courier:
    """The thread that advances sendings, so that reading and converting pages does not hold up the
    engine."""

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[Sending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    def advance(self, sending: Sending) -> None:
        """Has a sending advanced soon."""
        self._due.put(sending)

    def close(self) -> None:
        """Ends the thread."""
        self._due.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (sending := self._due.get()) is not None:
            try:
                sending.advance()
            except Exception as error:  # it concerns this prompt alone
                logger.exception("pages of a prompt could not be sent")
                sending.fail(f"{type(error).__name__}: {error}")
