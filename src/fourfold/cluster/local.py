"""Workers in processes of this machine, started again when they end.

A process is started over a socket that it inherits and ends with either side: when this process has
gone, however it went, the worker reads the end of the socket and leaves its GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence

from fourfold import errors
from fourfold.engine.building import Progress
from fourfold.engine.channel import FromEngine, LoadFailed, Ready
from fourfold.engine.channel import Progress as ProgressMade
from fourfold.engine.messages import Role
from fourfold.errors import FourfoldError
from fourfold.gateway.fleet.fleet import Fleet
from fourfold.gateway.fleet.members import CLOSED, Member

logger = logging.getLogger(__name__)

_LAST_STEP = 30.0
"""Seconds that a running step and the end of its process may take before it is killed."""
_OBITUARY = 5.0
"""Seconds to wait for the exit code of a process whose socket has closed."""
_LOOKS = 0.02
"""Seconds between two looks at a process that is about to end."""
_LONGEST_PAUSE = 30.0
"""Seconds before a process that keeps ending is started once more."""
_LONG_LIFE = 60.0
"""Seconds after which a process that ends is not one that keeps ending."""
_MOST_FAILED_LOADS = 3
"""In a row, of every worker there is to be, with none that takes requests: then the server ends."""


@dataclasses.dataclass(eq=False)
class _Place:
    """A worker that there is to be, and the process that is it now."""

    name: str
    role: Role
    ordinal: int
    process: subprocess.Popen[bytes] | None = None
    born: float = 0.0
    ready: bool = False
    failure: FourfoldError | None = None
    """Why it could not load, if it said so."""
    loaded: tuple[int, int] = (0, 0)
    deaths: int = 0
    failed_loads: int = 0
    first: asyncio.Future[None] | None = None
    """Done when it is ready for the first time, or failed to be."""


class LocalWorkers:
    """Starts a fleet's local workers and keeps them there."""

    def __init__(self, fleet: Fleet, roles: Sequence[Role]) -> None:
        """Nothing is started yet. The fleet's events are heard from now on."""
        self._fleet = fleet
        self._places = [_Place(name, role, i) for i, (name, role) in enumerate(_named(roles))]
        self._place_of: dict[int, _Place] = {}
        self._burials: set[asyncio.Task[None]] = set()
        self._progress: Progress = lambda done, total: None
        fleet.on_event = self._hear
        fleet.on_stop = self.reap
        fleet.reserved = frozenset(place.name for place in self._places)

    def start(self) -> None:
        """Starts all processes; they load once they are listened to."""
        for place in self._places:
            self._start(place)

    async def load(self, progress: Progress) -> None:
        """Waits until all take requests, while the fleet listens, or will again: one may have died
        since. Raises what `build_engine` raises there, and `FourfoldError` where one ends before.
        """
        self._progress = progress
        loop = asyncio.get_running_loop()
        for place in self._places:
            place.first = loop.create_future()
        firsts = [place.first for place in self._places if place.first is not None]
        try:
            await asyncio.gather(*firsts)
            while self._burials:  # which would end with this loop
                await asyncio.wait(self._burials)
        finally:
            self._progress = lambda done, total: None
            for first in firsts:
                first.cancel()

    def reap(self) -> None:
        """Waits for the processes, which have been told to end, and kills those that take long."""
        deadline = time.monotonic() + _LAST_STEP
        for place in self._places:
            if place.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    place.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Ends all processes at once."""
        for place in self._places:
            if place.process is not None:
                place.process.kill()
                place.process.wait()

    def _start(self, place: _Place) -> None:
        if self._fleet.stopping:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            command = ["-P", "-m", "fourfold.engine.worker", str(theirs.fileno())]
            place.process = subprocess.Popen(
                [sys.executable, *command, place.name, place.role],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=self._environment(),
                process_group=0,  # Ctrl-C is for this process, which lets requests finish
            )
        place.born, place.ready, place.failure = time.monotonic(), False, None
        workers = len(self._places)
        member = self._fleet.add(ours, local=True, ordinal=place.ordinal, workers=workers)
        self._place_of[member.number] = place

    def _environment(self) -> dict[str, str]:
        """Workers share the cores, if there are several."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        own = {"PYTHONPATH": os.pathsep.join(sys.path)}
        if len(self._places) > 1:
            own["OMP_NUM_THREADS"] = str(max(1, (cores or 1) // len(self._places)))
        return own | os.environ | {"PYTHONPATH": own["PYTHONPATH"]}

    def _hear(self, member: Member, message: FromEngine | None, why: str) -> None:
        place = self._place_of.get(member.number)
        if place is None:
            return
        match message:
            case ProgressMade():
                place.loaded = message.done, message.total
                done, total = map(sum, zip(*(p.loaded for p in self._places), strict=True))
                self._progress(done, total)
            case LoadFailed():
                place.failure = _error(message)
            case Ready():
                place.ready, place.failed_loads = True, 0
                if place.first is not None and not place.first.done():
                    place.first.set_result(None)
            case None:
                del self._place_of[member.number]
                if not self._fleet.stopping:
                    burial = asyncio.get_running_loop().create_task(self._bury(place, why))
                    self._burials.add(burial)
                    burial.add_done_callback(self._burials.discard)

    async def _bury(self, place: _Place, why: str) -> None:
        """Finds out how a process ended, and starts another after a while."""
        end = await _end_of(place, why)
        error = place.failure or FourfoldError(
            f"the engine's process {end} while it was loading; what it wrote before says why"
        )
        if place.first is not None and not place.first.done():
            place.first.set_exception(error)
            return
        if not place.ready:
            place.failed_loads += 1
            if self._is_hopeless():
                self._fleet.fail(error)
                return
        if time.monotonic() - place.born > _LONG_LIFE:
            place.deaths = 0
        pause = min(_LONGEST_PAUSE, 2.0**place.deaths)
        if pause < _LONGEST_PAUSE:
            place.deaths += 1
        reason = f": {place.failure}" if place.failure else ""
        logger.warning(
            "worker %s: its process %s%s; it starts again in %g s", place.name, end, reason, pause
        )
        while True:
            await asyncio.sleep(pause)
            try:
                self._start(place)
            except OSError as error:
                logger.error("worker %s cannot be started: %s", place.name, error)
                pause = _LONGEST_PAUSE
            else:
                return

    def _is_hopeless(self) -> bool:
        """Whether there is no use in starting workers again, and nobody else to compute."""
        if any(member.takes_requests for member in self._fleet.members):
            return False
        return all(place.failed_loads >= _MOST_FAILED_LOADS for place in self._places)


def _named(roles: Sequence[Role]) -> list[tuple[str, Role]]:
    """Names for workers: the role, and a number."""
    seen: Counter[Role] = Counter()
    names = []
    for role in roles:
        names.append((f"{role}-{seen[role]}", role))
        seen[role] += 1
    return names


async def _end_of(place: _Place, why: str) -> str:
    """How a process ended: the end of a sentence. It is killed unless it ends by itself."""
    process = place.process
    assert process is not None
    deadline = time.monotonic() + (_OBITUARY if why == CLOSED else 0)
    while process.poll() is None:
        if time.monotonic() >= deadline:
            process.kill()
            await asyncio.to_thread(process.wait)
            return f"was ended, for {why}"
        await asyncio.sleep(_LOOKS)
    code = process.returncode
    if code >= 0:
        return f"ended with exit code {code}"
    hint = "; perhaps memory ran out" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def _error(message: LoadFailed) -> FourfoldError:
    kind: type[FourfoldError] = getattr(errors, message.kind)
    return kind(message.message)
