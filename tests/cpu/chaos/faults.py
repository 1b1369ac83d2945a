"""Faults, drawn from a seed, that strike when the protocol comes to a point."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, get_args

from fourfold.engine.messages import Role
from fourfold.gateway.fleet.members import Member, State
from tests.cpu.chaos import strangers
from tests.cpu.chaos.crew import Joiner
from tests.cpu.chaos.relay import Trouble

if TYPE_CHECKING:
    from tests.cpu.chaos.run import Run

POINTS = (
    "submitted",
    "granted",
    "first token",
    "continued",
    "moved",
    "decoding",
    "between pages",
    "loading",
    "leaving",
    "any time",
)
_RARE = ("loading", "leaving")
"""Points that a worker comes to only after another fault: what strikes there waits for them."""

_KINDS = {
    # To a process, started here or joined.
    "kill": 3,
    "pause": 3,
    "freeze": 2,
    # To one that joined.
    "terminate": 2,
    "cut off the gateway": 3,
    "mute the gateway": 2,
    "slow the gateway": 1,
    "flip a bit of the gateway": 2,
    # To the pages that come to it.
    "cut off pages": 4,
    "mute pages": 2,
    "slow pages": 2,
    "flip": 5,
    "duplicate": 4,
    "swap": 4,
    "tear": 4,
    "drop": 3,
    # To all.
    "garbage": 4,
    "silence": 2,
    "wrong key": 3,
    "stale frames": 4,
    "abort storm": 3,
    "change of role": 3,
    "stall of the gateway": 0.5,
}
_OF_PAGES: frozenset[str] = frozenset(get_args(Trouble))


class Fault(NamedTuple):
    """What is to happen, and when."""

    kind: str
    point: str
    side: str
    """Whom it strikes of those that compute a part: "prefill" or "decode"."""
    skip: int
    """How often the point is passed before."""


def longest_stall(timeout: float) -> float:
    """Seconds for which the gateway may be made to stand still: longer than silence is borne."""
    return timeout + 0.5


class Faults:
    """Those that are armed, and those whose consequences are not over."""

    def __init__(self, run: Run, rng: random.Random) -> None:
        self._run, self._rng = run, rng
        self._armed: list[tuple[Fault, int]] = []
        self._healing = 0
        self._stopped: dict[int, float] = {}
        self.struck: dict[int, tuple[float, str]] = {}
        """When a process was killed or frozen, and how, by its number; until the fleet notices, or
        it goes on unnoticed: what loads may be silent, and a gateway that stood still blames
        nobody."""

    @property
    def over(self) -> bool:
        """Whether everything that was made to fail for a while works again."""
        return not self._healing

    def draw(self) -> Fault:
        """A fault and its point; a storm of aborts strikes anywhere, a swap only frames."""
        kind = self._rng.choices(list(_KINDS), list(_KINDS.values()))[0]
        side = self._rng.choice(("prefill", "decode", "decode"))
        if kind in _OF_PAGES:
            return Fault(kind, "between pages", "decode", 0)
        point = self._rng.choice(POINTS)
        return Fault(kind, point, side, self._rng.choice((0, 0, 1, 3, 8)))

    def arm(self, fault: Fault) -> None:
        """Has it strike at its point."""
        if fault.kind in _OF_PAGES:
            self._strike(fault, "between pages", None)
        elif fault.point == "any time":
            delay = self._rng.random() * 0.5
            self._later(delay, lambda: self._strike(fault, fault.point, None))
        else:
            self._armed.append((fault, fault.skip))

    def come_to(self, point: str, sides: dict[str, Member | None]) -> None:
        """The protocol is at a point; `sides` are the workers concerned."""
        for index, (fault, skip) in enumerate(self._armed):
            if fault.point != point:
                continue
            if skip:
                self._armed[index] = fault, skip - 1
                continue
            del self._armed[index]
            self._strike(fault, point, sides.get(fault.side))
            return

    def expire(self) -> None:
        """What waits for a common point strikes now."""
        armed, self._armed = self._armed, []
        for fault, skip in armed:
            if fault.point in _RARE and len(self._armed) < 4:
                self._armed.append((fault, skip))
            else:
                self._strike(fault, "any time", None)

    def disarm(self) -> None:
        self._armed.clear()

    def _strike(self, fault: Fault, point: str, whom: Member | None) -> None:
        run, kind = self._run, fault.kind
        if kind in _ON_ALL:
            run.story.fault(kind, point, "all")
            _ON_ALL[kind](self)
            return
        ready = [member for member in run.fleet.members if member.state is State.READY]
        if whom is None or whom.hello.pid in self._stopped:
            ready = [member for member in ready if member.hello.pid not in self._stopped]
            if not ready:
                return
            wanted = [member for member in ready if member.role is not _OTHER[fault.side]]
            whom = self._rng.choice(wanted or ready)
        joiner = run.crew.by_pid(whom.hello.pid)
        if kind in _ON_PROCESS:
            able = len(ready) > 2 and (joiner is not None or run.may_kill_local(whom))
            kind = kind if able or kind == "pause" else "pause"
            run.story.fault(kind, point, whom.name)
            _ON_PROCESS[kind](self, whom, joiner)
            return
        if joiner is None:
            joiners = [each for each in run.crew.joiners.values() if each.pid]
            if not joiners:
                return
            joiner = self._rng.choice(joiners)
        if kind in _OF_PAGES:  # told when a frame has come
            joiner.pages.trouble(kind)
            return
        if kind == "terminate" and len(ready) < 3:
            return
        run.story.fault(kind, point, joiner.name)
        _ON_JOINER[kind](self, joiner)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        """Does something after a while, which the round waits for."""
        self._healing += 1

        def do() -> None:
            self._healing -= 1
            work()

        asyncio.get_running_loop().call_later(seconds, do)

    # What strikes a process.

    def _kill(self, member: Member, joiner: Joiner | None) -> None:
        self._note_strike(member, "killed")
        self._signal(member, joiner, signal.SIGKILL)

    def _pause(self, member: Member, joiner: Joiner | None) -> None:
        self._stop(member, joiner, self._rng.uniform(0.05, 0.6))

    def _freeze(self, member: Member, joiner: Joiner | None) -> None:
        self._note_strike(member, "frozen")
        seconds = self._run.timeout + self._rng.uniform(0.7, 1.5)
        if self._run.plan.long_freeze is not None and self._rng.random() < 0.1:
            seconds = self._run.plan.long_freeze
        self._stop(member, joiner, seconds)

    def _stop(self, member: Member, joiner: Joiner | None, seconds: float) -> None:
        pid = member.hello.pid
        if pid in self._stopped:
            return
        self._stopped[pid] = time.monotonic() + seconds
        self._signal(member, joiner, signal.SIGSTOP)

        def wake() -> None:
            del self._stopped[pid]
            if self.struck.pop(member.number, None) is not None:
                self._run.story.tell(f"nobody noticed that {member.name} was frozen")
            self._signal(member, joiner, signal.SIGCONT)
            self._run.story.tell(f"{member.name} goes on")

        self._later(seconds, wake)

    def _note_strike(self, member: Member, how: str) -> None:
        self.struck[member.number] = time.monotonic(), f"{member.name}, {member.state}, was {how}"

    def _signal(self, member: Member, joiner: Joiner | None, number: signal.Signals) -> None:
        if joiner is not None and joiner.pid == member.hello.pid:
            self._run.crew.signal(joiner, number)
        elif joiner is None:
            self._run.signal_local(member, number)

    # What strikes one that joined.

    def _terminate(self, joiner: Joiner) -> None:
        self._run.crew.signal(joiner, signal.SIGTERM)

    def _cut_gateway(self, joiner: Joiner) -> None:
        joiner.door.cut()

    def _mute_gateway(self, joiner: Joiner) -> None:
        joiner.door.mute(*self._rng.choice((("in",), ("out",), ("in", "out"))))
        seconds = self._rng.choice((0.3, self._run.timeout + 1.0))
        self._later(seconds, joiner.door.heal)

    def _slow_gateway(self, joiner: Joiner) -> None:
        joiner.door.slow(self._rng.uniform(0.01, 0.1))
        self._later(0.7, joiner.door.heal)

    def _flip_gateway(self, joiner: Joiner) -> None:
        joiner.door.flip()

    def _cut_pages(self, joiner: Joiner) -> None:
        joiner.pages.cut()

    def _mute_pages(self, joiner: Joiner) -> None:
        joiner.pages.mute(*self._rng.choice((("in",), ("out",), ("in", "out"))))
        self._later(self._rng.choice((0.3, 4.0)), joiner.pages.heal)

    def _slow_pages(self, joiner: Joiner) -> None:
        joiner.pages.slow(self._rng.uniform(0.005, 0.05))
        self._later(0.7, joiner.pages.heal)

    # What strikes all.

    def _visit(self, kind: str) -> None:
        visit = getattr(strangers, kind)
        for address in self._run.addresses():
            self._run.visit(visit, address, random.Random(self._rng.getrandbits(32)))

    def _write_stale(self) -> None:
        key, leases = self._run.key, self._run.parts()[:8]
        for member in self._run.fleet.members:
            if member.ready is not None:
                rng = random.Random(self._rng.getrandbits(32))
                self._run.visit(strangers.write_stale, member.ready.peer, key, leases, rng)

    def _abort_some(self) -> None:
        for client in list(self._run.clients):
            if self._rng.random() < 0.5:
                client.leave()

    def _change_role(self) -> None:
        members = [member for member in self._run.fleet.members if member.ready is not None]
        if members:
            member = self._rng.choice(members)
            role = self._rng.choice(list(Role))
            self._run.story.tell(f"{member.name} becomes {role}")
            self._run.fleet.set_role(member.name, role)

    def _stall(self) -> None:
        time.sleep(self._rng.choice((0.3, longest_stall(self._run.timeout))))


_OTHER = {"prefill": Role.DECODE, "decode": Role.PREFILL}
_ON_PROCESS = {"kill": Faults._kill, "pause": Faults._pause, "freeze": Faults._freeze}
_ON_JOINER: dict[str, Callable[[Faults, Joiner], None]] = {
    "terminate": Faults._terminate,
    "cut off the gateway": Faults._cut_gateway,
    "mute the gateway": Faults._mute_gateway,
    "slow the gateway": Faults._slow_gateway,
    "flip a bit of the gateway": Faults._flip_gateway,
    "cut off pages": Faults._cut_pages,
    "mute pages": Faults._mute_pages,
    "slow pages": Faults._slow_pages,
}
_ON_ALL: dict[str, Callable[[Faults], None]] = {
    "garbage": lambda faults: faults._visit("say_garbage"),
    "silence": lambda faults: faults._visit("say_nothing"),
    "wrong key": lambda faults: faults._visit("show_wrong_key"),
    "stale frames": Faults._write_stale,
    "abort storm": Faults._abort_some,
    "change of role": Faults._change_role,
    "stall of the gateway": Faults._stall,
}
