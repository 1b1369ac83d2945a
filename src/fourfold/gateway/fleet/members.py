"""One worker as the gateway knows it: its connection, what it said of itself, what it holds."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import logging
import socket
import time
from typing import Protocol

import msgspec

from fourfold.engine.channel import (
    Channel,
    FromEngine,
    Hello,
    Load,
    News,
    Ready,
    ToEngine,
    encode,
)
from fourfold.engine.messages import EngineStats, Role
from fourfold.transport.stats import PathStats

logger = logging.getLogger(__name__)

CLOSED = "it closed its connection"
_MOST_UNSENT = 1 << 28
"""Bytes that may wait for a worker to read them before it is given up."""
_SETTLING = 0.2
"""Weight of the newest measurement of a rate."""
_WORTH_MEASURING = 0.02
"""Seconds of steps from which a rate is taken."""


class State(enum.StrEnum):
    """How far a worker is. It takes requests while it is READY."""

    JOINING = "joining"
    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"
    GONE = "gone"


@dataclasses.dataclass
class Burden:
    """What a part of a request asks of one worker."""

    samples: int
    pages: int
    tokens: int
    """Of its prompt, not computed yet."""

    def add(self, other: Burden, times: int = 1) -> None:
        """Adds another's, or takes it away."""
        self.samples += times * other.samples
        self.pages += times * other.pages
        self.tokens += times * other.tokens


class Listener(Protocol):
    """Who is told what happens to workers, on the loop."""

    def heard(self, member: Member, message: FromEngine) -> None: ...
    def ended(self, member: Member, why: str) -> None:
        """Once, when the connection is closed by either side; nothing is heard afterwards."""


class Member:
    """A worker at the other end of a socket, which is closed with it."""

    def __init__(
        self, number: int, connection: socket.socket, listener: Listener, *, local: bool
    ) -> None:
        """A `local` one was started here, and shares our clock."""
        self.number = number
        self.state = State.JOINING
        self.hello = Hello("", Role.BOTH, 0)
        self.role = Role.BOTH
        self.ready: Ready | None = None
        self.stats = EngineStats()
        self.local = local
        self.load: Load | None = None
        """What it is told to build, once it has said who it is."""
        self.paths: list[PathStats] = []
        self.last_heard = time.monotonic()
        self.leaves_at = float("inf")
        """When it is given up if it still holds anything then, by `time.monotonic`."""
        self.burden = Burden(samples=0, pages=0, tokens=0)
        """Of all that it was given and has not finished."""
        self._burdens: dict[int, Burden] = {}
        self.prompt_rate: float | None = None
        """Prompt tokens per second of steps that compute mostly prompts."""
        self.token_rate: float | None = None
        """Tokens per second of steps that only decode."""
        self._listener = listener
        self._connection = connection
        connection.setblocking(False)
        self._channel: Channel[FromEngine] = Channel(connection, FromEngine)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outgoing = bytearray()
        self._measured = EngineStats()

    @property
    def name(self) -> str:
        return self.hello.name

    @property
    def takes_requests(self) -> bool:
        return self.state is State.READY

    @property
    def pages_free(self) -> int:
        """Pages that nobody owns, and that no part on its way will want."""
        return self.stats.pages_total - max(self.stats.pages_in_use, self.burden.pages)

    @property
    def idle(self) -> bool:
        """Whether it holds no part of any request."""
        return not self._burdens

    def welcome(self, ready: Ready) -> None:
        """It takes requests, unless it leaves already."""
        self.ready = ready
        self.stats = self._measured = ready.stats
        if self.state is State.LOADING:
            self.state = State.READY

    def take(self, part: int, burden: Burden) -> None:
        """It was given a part to compute."""
        self._burdens[part] = burden
        self.burden.add(burden)

    def began(self, part: int) -> None:
        """It has computed a part's prompt."""
        if (burden := self._burdens.get(part)) is not None:
            self.burden.tokens -= burden.tokens
            burden.tokens = 0

    def drop(self, part: int) -> None:
        """It has nothing to do with a part any more."""
        if (burden := self._burdens.pop(part, None)) is not None:
            self.burden.add(burden, -1)

    @property
    def must_speak(self) -> bool:
        """Whether silence means that it is dead. Loading, and starting a process, may take long."""
        return self.state in (State.READY, State.LEAVING) or (
            self.state is State.JOINING and not self.local
        )

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listens on a loop from now on."""
        self._loop = loop
        self.last_heard = time.monotonic()
        loop.add_reader(self._connection, self._read)
        if self._outgoing:
            loop.call_soon(self._flush)

    def detach(self) -> None:
        """Listens no more, until it is attached again."""
        if self._loop is not None and self.state is not State.GONE:
            self._loop.remove_reader(self._connection)
            self._loop.remove_writer(self._connection)
        self._loop = None

    def send(self, message: ToEngine) -> None:
        """Queues a message; what is queued in one turn of the loop is sent together."""
        if self.state is State.GONE:
            return
        if not self._outgoing and self._loop is not None:
            self._loop.call_soon(self._flush)
        self._outgoing += encode(message)
        if len(self._outgoing) > _MOST_UNSENT and self._loop is not None:
            self._loop.call_soon(self.end, "it reads nothing of what it is sent")

    def end(self, why: str) -> None:
        """Closes the connection and says so, once."""
        if self.state is State.GONE:
            return
        self._flush()  # last words, as far as there is room for them
        self.detach()
        self.state = State.GONE
        self._connection.close()
        self._outgoing.clear()
        self._listener.ended(self, why)

    def note(self, stats: EngineStats) -> None:
        """Takes in a worker's numbers, and how fast it was between two of them."""
        self.stats, before = stats, self._measured
        seconds = stats.step_seconds - before.step_seconds
        if seconds < _WORTH_MEASURING:
            return
        self._measured = stats
        prompts = stats.prompt_tokens - before.prompt_tokens
        answers = stats.generated_tokens - before.generated_tokens
        if prompts > answers:
            self.prompt_rate = _settle(self.prompt_rate, prompts / seconds)
        elif prompts == 0 and answers:
            self.token_rate = _settle(self.token_rate, answers / seconds)

    def _read(self) -> None:
        try:
            messages = self._channel.receive()
        except BlockingIOError:
            return
        except EOFError:
            self.end(CLOSED)
            return
        except (ValueError, msgspec.MsgspecError) as error:
            self.end(f"what it sent is no message of ours ({error})")
            return
        self.last_heard = time.monotonic()
        for message in messages:
            if isinstance(message, News):
                self.note(message.stats)
                self.paths = self.paths if message.paths is None else message.paths
            try:
                self._listener.heard(self, message)
            except Exception:  # what follows would leave a gap: what it holds goes on elsewhere
                logger.exception("what worker %s said could not be dealt with", self.name)
                self.end("what it said could not be dealt with")
            if self.state is State.GONE:
                return

    def _flush(self) -> None:
        if self.state is State.GONE or not self._outgoing:
            return
        try:
            del self._outgoing[: self._connection.send(self._outgoing)]
        except BlockingIOError:
            pass
        except OSError:  # reading will say so too
            self._outgoing.clear()
        if self._loop is None:
            return
        if self._outgoing:
            self._loop.add_writer(self._connection, self._flush)
        else:
            self._loop.remove_writer(self._connection)


def _settle(rate: float | None, newest: float) -> float:
    return newest if rate is None else rate + _SETTLING * (newest - rate)
