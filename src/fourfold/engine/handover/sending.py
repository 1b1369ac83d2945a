"""Sending the pages of prompts while they are computed, on a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from fourfold.engine.handover.pages import Outlet, Prompt, in_steps, records_of, rows_of
from fourfold.engine.progress import Reached
from fourfold.quadrants.kv_pages import PAGE_TOKENS
from fourfold.transport.format import PageFormat
from fourfold.transport.link import Transfer
from fourfold.transport.pieces import Part, Piece

logger = logging.getLogger(__name__)

_AT_ONCE = 1 << 20
"""Bytes up to which a prompt is sent as one when it is computed; above, layer after layer."""
_LOOK_SECONDS = 0.0005
"""Between two looks at how far a step is."""


class Route(NamedTuple):
    """Where a prompt goes, once its receiver has granted pages."""

    transfer: Transfer
    outlet: Outlet
    theirs: PageFormat
    found: int
    """Pages that the receiver had already."""


class Sending:
    """One prompt on its way; what is computed before the receiver has granted pages waits here.

    One thread advances it, another begins it and cancels it, and waits for nothing meanwhile.
    """

    def __init__(self, prompt: Prompt, layers: int, failed: Callable[[str], None]) -> None:
        """`failed` is called with the reason where pages cannot be read, converted or sent."""
        self._prompt = prompt
        self._failed = failed
        self._stored = [0] * layers
        self._sent = [0] * layers
        self._unsent = set(range(layers))
        self._route: Route | None = None
        # What follows changes under the lock, which is held for a moment only.
        self._over = False
        self._advancing = False
        self._left: Callable[[], None] | None = None
        """To be called when it is not advanced any more."""
        self._lock = threading.Lock()

    @property
    def layers(self) -> int:
        """Of the model."""
        return len(self._stored)

    def begin(self, route: Route) -> None:
        """The receiver holds pages now."""
        with self._lock:
            self._route = route
            self._sent = [route.found] * len(self._sent)

    @property
    def is_wanted(self) -> bool:
        """Whether there is more to be sent."""
        return bool(self._unsent) and not self._over

    def stored(self, layers: Iterable[int], tokens: int) -> None:
        """The first `tokens` tokens are in the pages of these layers. For the thread that advances
        it."""
        for layer in layers:
            # The end of a step may be heard of after the next one's first layers.
            self._stored[layer] = max(self._stored[layer], tokens)

    def cancel(self, left: Callable[[], None]) -> bool:
        """Gives it up, once; never waits. Returns whether nothing reads the pages any more; else
        `left` is called when that is so, by the thread that advances it or by one of the
        transport."""
        with self._lock:
            self._over = True
            if self._advancing:
                self._left = left
                return False
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
            route = self._route
            if self._over or route is None or not self._unsent:
                return
            self._advancing = True
        try:
            self._send(route)
        finally:
            with self._lock:
                self._advancing, left = False, self._left
            if left is not None and route.transfer.cancel(left):
                left()

    def _send(self, route: Route) -> None:
        for pieces in self._ready(route):
            if self._over:
                return
            route.transfer.write(pieces)
        if not self._unsent:
            route.transfer.finish()

    def _ready(self, route: Route) -> Iterator[list[Piece]]:
        """What is to be sent, each time as much as may be copied at once."""
        stored = self._stored
        prompt, theirs = self._prompt, route.theirs
        records = records_of(theirs, prompt.tokens) - route.found
        small = len(stored) * records * theirs.record_bytes <= _AT_ONCE
        if small and min(stored) < prompt.tokens:
            return
        due: dict[tuple[int, int, bool], list[int]] = {}
        for layer in sorted(self._unsent):
            last = stored[layer] == prompt.tokens
            end = records_of(theirs, prompt.tokens) if last else stored[layer] // PAGE_TOKENS
            due.setdefault((self._sent[layer], end, last), []).append(layer)
        for (first, end, last), layers in due.items():
            yield from self._read(route, layers, first, end, last=last)

    def _read(
        self, route: Route, layers: list[int], first: int, end: int, *, last: bool
    ) -> Iterator[list[Piece]]:
        """Records `first : end` of some layers, and the rows after the last."""
        outlet, prompt = route.outlet, self._prompt
        for some, begin, until in in_steps(layers, first, end, outlet.record_bytes):
            count, place = until - begin, begin - route.found
            records = outlet.records(some, prompt, begin, count)
            yield [
                Piece(Part.PAGES, layer, place, count, data)
                for layer, data in zip(some, records, strict=True)
            ]
            for layer in some:
                self._sent[layer] = until
        if last:
            self._unsent.difference_update(layers)
            if rows_of(route.theirs, prompt.tokens):
                rows = outlet.rows(layers, prompt)
                yield [
                    Piece(Part.OPEN, layer, 0, 1, data)
                    for layer, data in zip(layers, rows, strict=True)
                ]


class Stored(NamedTuple):
    """The first `tokens` tokens of a prompt are in the pages of these layers."""

    sending: Sending
    layers: Iterable[int]
    tokens: int


class Computing:
    """Chunks of prompts that a step under way computes."""

    def __init__(self, reached: Reached, chunks: Sequence[tuple[Sending, int]]) -> None:
        """`reached` tells in how many layers' pages they are; `chunks` are sendings, and the tokens
        up to the chunk's end."""
        self._reached, self._chunks = reached, chunks
        self._known = 0

    def news(self) -> list[Stored]:
        """What has been stored since last time."""
        known, self._known = self._known, self._reached()
        layers = range(known, self._known)
        return [Stored(sending, layers, end) for sending, end in self._chunks] if layers else []

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be heard of it: all is stored, or nobody wants it any more."""
        return not any(
            sending.is_wanted and self._known < sending.layers for sending, _ in self._chunks
        )


class Courier:
    """The thread that advances sendings, so that reading and converting pages does not hold up the
    engine. What is stored is known to it alone."""

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[Stored | Computing | None] = queue.SimpleQueue()
        self._followed: list[Computing] = []
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._thread.start()

    def advance(self, sending: Sending, layers: Iterable[int] = (), tokens: int = 0) -> None:
        """Has a sending advanced soon, whose first `tokens` tokens are in the pages of these
        layers."""
        self._due.put(Stored(sending, layers, tokens))

    def follow(self, computing: Computing) -> None:
        """Has sendings advanced while a step computes them."""
        self._due.put(computing)

    def close(self) -> None:
        """Ends the thread."""
        self._due.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                due = self._due.get(timeout=_LOOK_SECONDS if self._followed else None)
            except queue.Empty:
                self._look()
                continue
            match due:
                case None:
                    return
                case Computing():
                    self._followed.append(due)
                case Stored():
                    self._advance(due)

    def _look(self) -> None:
        """Sends what steps have stored by now."""
        for computing in self._followed:
            for stored in computing.news():
                self._advance(stored)
        self._followed = [computing for computing in self._followed if not computing.is_over]

    def _advance(self, stored: Stored) -> None:
        sending = stored.sending
        try:
            sending.stored(stored.layers, stored.tokens)
            sending.advance()
        except Exception as error:  # it concerns this prompt alone
            logger.exception("pages of a prompt could not be sent")
            sending.fail(f"{type(error).__name__}: {error}")
