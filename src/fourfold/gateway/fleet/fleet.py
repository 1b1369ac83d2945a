"""Many workers as one engine.

Lives on the gateway's loop. Workers are handed to it as open sockets (`cluster` starts them or lets
them join); it loads them, watches them, and follows every request through the death of any of them
(`Flight`). A worker is dead when its connection is closed or it was silent for too long: a late
word of it is not heard, for nobody listens on that connection any more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable

import msgspec

from fourfold.engine.building import EngineSetup, ModelFacts
from fourfold.engine.channel import (
    ALIVE_SECONDS,
    Alive,
    FromEngine,
    Hello,
    Leaving,
    Load,
    LoadFailed,
    News,
    Progress,
    Ready,
    Refused,
    Stop,
)
from fourfold.engine.messages import Abort, EngineStats, Granted, Role, Submit, TokenOutput
from fourfold.errors import ConfigError, FourfoldError, RequestError
from fourfold.gateway.fleet.config import FleetConfig
from fourfold.gateway.fleet.dispatcher import Counts, Dispatcher
from fourfold.gateway.fleet.flight import Flight
from fourfold.gateway.fleet.members import Member, State
from fourfold.gateway.fleet.status import WorkerStatus, describe
from fourfold.gateway.gateway import Emit
from fourfold.transport.config import TransportConfig
from fourfold.transport.format import check_agreement

logger = logging.getLogger(__name__)

_CLOSING = 5.0
"""Seconds for the loop to close what is left at the end."""
_GAUGES = (
    "running",
    "waiting",
    "moving",
    "shared",
    "pages_total",
    "pages_in_use",
    "pages_cached",
    "step_tokens",
    "graphs",
)


class Fleet:
    """Implements `EngineClient`; once started, to be used on the loop it was started on."""

    def __init__(
        self,
        setup: EngineSetup,
        config: FleetConfig,
        transport: TransportConfig,
        drain_timeout: float,
    ) -> None:
        """`transport` is for workers that are started here; one that leaves has `drain_timeout`
        seconds to finish."""
        self.config = config
        self.max_context = 0
        """Of the worker that holds the longest text; the last known where there is none."""
        self.model: ModelFacts | None = None
        """Once any worker is ready."""
        self.on_failure: Callable[[FourfoldError], None] = lambda error: None
        """Called on the loop when there is no use in waiting for workers."""
        self.on_event: Callable[[Member, FromEngine | None, str], None] = lambda *event: None
        """Called with what a worker says of its loading, and with None and the reason when it has
        gone."""
        self.on_stop: Callable[[], None] = lambda: None
        """Called by `stop` in its thread, once every worker has been told."""
        self.checkpoint: str | None = None
        """As `checkpoint_of`: what every worker must have a copy of; None for whatever the first
        has."""
        self.reserved: frozenset[str] = frozenset()
        """Names that only workers started here may have."""
        self._setup = setup
        self._transport = transport
        self._drain_timeout = drain_timeout
        self._members: dict[int, Member] = {}
        self._numbers = itertools.count(1)
        self._flights: dict[int, Flight] = {}
        self._outputs: list[TokenOutput] = []
        self._dispatcher = Dispatcher(
            self._members, self._outputs.append, prefix_cache=setup.config.prefix_cache
        )
        self._roles: dict[str, Role] = {}
        """What workers were told by name, which holds for those that come after them too."""
        self._first: Ready | None = None
        self._past = EngineStats()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._emit: Emit | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._watched = 0.0
        self._waits: dict[int, float] = {}
        """Since when parts have waited for their pages."""
        self.stopping = False

    @property
    def stats(self) -> EngineStats:
        """The sum over all workers, counters of those that have gone included."""
        total = self._past
        for member in self._members.values():
            total = _sum(total, member.stats)
        return total

    @property
    def counts(self) -> Counts:
        return self._dispatcher.counts

    @property
    def takes_requests(self) -> bool:
        """Whether any worker does, of whichever role; while none does, requests wait."""
        return any(member.takes_requests for member in self._members.values())

    @property
    def parked(self) -> int:
        """Requests of which something waits for a worker."""
        return len(self._parked())

    @property
    def workers(self) -> list[WorkerStatus]:
        """All workers that said who they are, by name."""
        known = [member for member in self._members.values() if member.name]
        return [describe(member) for member in sorted(known, key=lambda member: member.name)]

    @property
    def members(self) -> list[Member]:
        """All workers whose connection is open, oldest first."""
        return list(self._members.values())

    def add(
        self, connection: socket.socket, *, local: bool = False, ordinal: int = 0, workers: int = 1
    ) -> Member:
        """Takes a worker in, which will say `Hello` and be told to load the model; `ordinal` and
        `workers` as in `Load`."""
        member = Member(next(self._numbers), connection, self, local=local)
        member.load = Load(
            self._setup,
            None if local else self.config.worker_timeout,
            ordinal,
            workers,
            self._transport if local else None,
        )
        self._members[member.number] = member
        if self._loop is not None:
            member.attach(self._loop)
        return member

    def attach(self) -> None:
        """Listens to workers on the running loop, until `detach`."""
        self._loop = asyncio.get_running_loop()
        for member in self.members:
            member.attach(self._loop)

    def detach(self) -> None:
        for member in self.members:
            member.detach()
        self._loop = None

    def start(self, emit: Emit) -> None:
        self._emit = emit
        self.attach()
        self._watched = time.monotonic() - ALIVE_SECONDS
        self._watch_over()

    def submit(self, request: Submit) -> None:
        flight = Flight(request, self._dispatcher, self.config.max_attempts)
        self._flights[request.request_id] = flight
        flight.begin()
        self._settle([flight])

    def abort(self, message: Abort) -> None:
        flight = self._flights.get(message.request_id)
        if flight is not None:
            flight.abort(message)
            self._settle([flight])

    async def one_ready(self) -> None:
        """Waits until a worker takes requests, while the fleet listens."""
        while self.model is None:
            await asyncio.sleep(ALIVE_SECONDS)

    def set_role(self, name: str, role: Role) -> WorkerStatus:
        """Gives a worker new work by another role from now on. Raises `RequestError` if there is
        none of that name."""
        for member in self._members.values():
            if member.name == name:
                logger.info("worker %s takes %s from now on, not %s", name, role, member.role)
                member.role = self._roles[name] = role
                self._try_again(self._parked())
                return describe(member)
        known = ", ".join(worker.name for worker in self.workers)
        raise RequestError(f"there is no worker {name!r}; the workers are {known}", param="name")

    def stop(self) -> None:
        """Ends all workers that were started here once their running steps are done, and lets the
        others go; may be called from any thread while the loop runs."""
        self.stopping = True
        loop = self._loop
        if loop is None:
            self.on_stop()
            self.kill()
            return
        loop.call_soon_threadsafe(self._say_stop)
        self.on_stop()
        closed = threading.Event()
        loop.call_soon_threadsafe(self._close, closed)
        closed.wait(_CLOSING)

    def kill(self) -> None:
        """Closes every connection at once; only while no loop runs."""
        self.stopping = True
        for member in self.members:
            member.detach()
            member.end("the gateway ends")

    def fail(self, error: FourfoldError) -> None:
        """Nothing will be computed any more."""
        self.on_failure(error)

    def heard(self, member: Member, message: FromEngine) -> None:
        """As `Listener.heard`."""
        match message:
            case News():
                self._take_news(member, message)
            case Hello():
                self._greet(member, message)
            case Ready():
                self._welcome(member, message)
            case Leaving():
                self._see_off(member)
            case LoadFailed() if not member.local:
                logger.warning("worker %s could not load: %s", member.name, message.message)
        if isinstance(message, Progress | Ready | LoadFailed):
            self.on_event(member, message, "")

    def ended(self, member: Member, why: str) -> None:
        """As `Listener.ended`."""
        del self._members[member.number]
        self._past = _sum(self._past, _counters(member.stats))
        self._dispatcher.forget(member.number)
        self._measure_context()
        expected = self.stopping or member.leaves_at < float("inf")
        if not expected and member.ready is not None:
            logger.warning("worker %s is lost: %s", member.name, why)
        concerned = list(self._flights.values())
        for flight in concerned:
            flight.lost(member.number, f"worker {member.name} was lost: {why}", blame=not expected)
        self.on_event(member, None, why)
        self._settle(concerned)

    def _take_news(self, member: Member, news: News) -> None:
        concerned: dict[int, Flight] = {}
        for told in news.handover:
            flight = self._dispatcher.flight(told.request_id)
            if flight is None:
                continue
            concerned[flight.request.request_id] = flight
            if isinstance(told, Granted):
                flight.granted(member.number, told)
            else:
                flight.moved(member.number, told)
        for output in news.outputs:
            flight = self._dispatcher.flight(output.request_id)
            if flight is not None:
                concerned[flight.request.request_id] = flight
                flight.hear(output.request_id, member.number, output)
        self._settle(list(concerned.values()), news.time if member.local else None)
        self._end_if_done(member)

    def _settle(self, concerned: list[Flight], since: float | None = None) -> None:
        """Forgets what has ended, and hands on what the last events brought."""
        for flight in concerned:
            if flight.done:
                self._flights.pop(flight.request.request_id, None)
        if self._outputs and self._emit is not None:
            outputs, self._outputs[:] = list(self._outputs), []
            self._emit(outputs, since)

    def _parked(self) -> list[Flight]:
        return [flight for flight in self._flights.values() if flight.parked]

    def _try_again(self, waiting: list[Flight]) -> None:
        """Sends out what waited."""
        for flight in waiting:
            flight.try_again()
        self._settle(waiting)

    def _greet(self, member: Member, hello: Hello) -> None:
        if member.state is not State.JOINING:
            return
        here = any(other.name == hello.name for other in self.members)
        reserved = hello.name in self.reserved and not member.local
        if here or reserved:
            why = f"a worker named {hello.name} is here already"
            refusal = Refused(f"{why}; give this one another --name", again=not reserved)
            member.send(refusal)
            member.end(why)
            return
        member.hello, member.state = hello, State.LOADING
        member.role = self._roles.get(hello.name, hello.role)
        assert member.load is not None
        member.send(member.load)

    def _welcome(self, member: Member, ready: Ready) -> None:
        if member.ready is not None or not member.name:
            return
        first = self._first or ready
        try:
            if self.checkpoint not in (None, ready.model.checkpoint):
                raise ConfigError(
                    f"this worker serves the model {ready.model.checkpoint}, the gateway "
                    f"{self.checkpoint}; start both with the same checkpoint"
                )
            check_agreement(
                ready.pages, first.pages, ready.model.fingerprint, first.model.fingerprint
            )
        except ConfigError as error:
            logger.error("worker %s is refused: %s", member.name, error)
            member.send(Refused(str(error)))
            member.end(str(error))
            return
        self._first, self.model = first, first.model
        member.welcome(ready)
        # It may have computed for an earlier connection: that is counted already, or is not ours.
        self._past = _sum(self._past, _counters(ready.stats), -1)
        self._measure_context()
        self._try_again(self._parked())

    def _measure_context(self) -> None:
        longest = [member.ready.max_context for member in self.members if member.ready is not None]
        self.max_context = max(longest, default=self.max_context)

    def _see_off(self, member: Member) -> None:
        """Gives a worker that wants to leave nothing more, and time to finish what it has."""
        if member.state is State.LEAVING:
            return
        logger.info("worker %s leaves", member.name)
        member.state = State.LEAVING
        member.leaves_at = time.monotonic() + self._drain_timeout
        self._end_if_done(member)

    def _end_if_done(self, member: Member) -> None:
        if member.state is State.LEAVING and member.idle:
            member.send(Stop())
            member.end("it has left")

    def _watch_over(self) -> None:
        """Says that we are there, and looks who else is; again and again."""
        assert self._loop is not None
        self._watch = self._loop.call_later(ALIVE_SECONDS, self._watch_over)
        now = time.monotonic()
        # For so long we may not have listened: what they said meanwhile may be unread.
        late = max(0.0, now - self._watched - ALIVE_SECONDS)
        self._watched = now
        for member in self.members:
            member.last_heard = min(now, member.last_heard + late)
            member.send(Alive())
            silent = now - member.last_heard
            if member.must_speak and silent > self.config.worker_timeout:
                member.end(f"it said nothing for {silent:.1f} seconds")
            elif now > member.leaves_at:
                member.send(Stop())
                member.end("it leaves, and was not done in time")
        self._try_again([flight for flight in self._flights.values() if flight.rests])
        self._look_for_stalls(now)

    def _look_for_stalls(self, now: float) -> None:
        """Gives up parts whose pages neither come nor fail."""
        flights = list(self._flights.values())
        waiting = [(flight, p) for flight in flights for p in flight.parts.values() if p.waits]
        self._waits = {part.number: self._waits.get(part.number, now) for _, part in waiting}
        for flight, part in waiting:
            overdue = now - self._waits[part.number] > self.config.pages_timeout
            if overdue and part.number in flight.parts:  # unless one before it ended them all
                why = "its pages did not come"
                self._dispatcher.avoid(part.route, why)
                flight.lose(part, why)
        self._settle(flights)

    def _say_stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        for member in self.members:
            if member.local:
                member.send(Stop())

    def _close(self, closed: threading.Event) -> None:
        for member in self.members:
            member.end("the gateway ends")
        closed.set()


def _sum(one: EngineStats, other: EngineStats, times: int = 1) -> EngineStats:
    fields = one.__struct_fields__
    return EngineStats(**{f: getattr(one, f) + times * getattr(other, f) for f in fields})


def _counters(stats: EngineStats) -> EngineStats:
    """Without the gauges of this moment."""
    return msgspec.structs.replace(stats, **dict.fromkeys(_GAUGES, 0))
