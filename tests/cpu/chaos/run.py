"""A gateway, workers and a network between them, and rounds of requests amid faults."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from fourfold.cluster.cluster import Cluster, make_cluster
from fourfold.cluster.config import ClusterConfig, LinkConfig
from fourfold.engine.channel import ALIVE_SECONDS
from fourfold.engine.messages import Role
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.fleet.config import FleetConfig
from fourfold.gateway.fleet.members import Member, State
from fourfold.gateway.local import GatewaySetup
from fourfold.gateway.tokenizer import load_tokenizer
from fourfold.models.checkpoint.source import find_source
from fourfold.models.precision import Precision
from fourfold.transport.config import TransportPath
from tests.cpu.chaos.client import Client
from tests.cpu.chaos.crew import Crew, until
from tests.cpu.chaos.faults import Faults, longest_stall
from tests.cpu.chaos.nursery import WHERE, Holdings
from tests.cpu.chaos.oracle import Answer, ExactJudge, Judge, LikelyJudge
from tests.cpu.chaos.questions import Question, draw_questions
from tests.cpu.chaos.relay import Network, Trouble
from tests.cpu.chaos.served import Served
from tests.cpu.chaos.sizes import Size, size_of
from tests.cpu.chaos.spy import Spy
from tests.cpu.chaos.story import Story

_FREE_SECONDS = 5.0
"""For everything to be free, as promised, once what was lost has been noticed: by the time that no
request is left and no fault goes on. On a loaded machine nobody can say how late a worker's turn
came; as long as this process itself came late is added."""
_LATE_SECONDS = 1.0
"""What a loaded machine may add to the time after which a loss is noticed."""
_LOOK_SECONDS = 0.05
_BACK_SECONDS = 60.0
"""For workers that were lost to be back."""
_END_SECONDS = 60.0
"""Deadline of a request."""
_STUCK_SECONDS = 15.0
"""After which it is told who holds what."""
_MOST = Size(resident_mib=150.0, descriptors=100, threads=100)
"""What a process may grow by."""
_MOST_OF_8_BITS = dataclasses.replace(_MOST, resident_mib=700.0)
"""For a CPU's products of 8 bits oneDNN keeps what it compiled for each number of rows, a thousand
at most: 550 MiB after a while."""
_MOST_ON_GPU = Size(resident_mib=600.0, descriptors=300, threads=200)
"""A GPU's driver takes more as it is used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How large a run is."""

    seed: int
    seconds: float
    """For rounds; a run takes longer, to begin and to end."""
    questions: int
    requests: int
    """Of each round."""
    faults: int
    """Of each round, at most."""
    prefill: int = 1
    decode: int = 1
    """Workers that the gateway starts."""
    joiners: tuple[tuple[str, Role, TransportPath], ...] = (
        ("far-prefill", Role.PREFILL, TransportPath.TCP),
        ("far-decode", Role.DECODE, TransportPath.TCP),
        ("near", Role.BOTH, TransportPath.AUTO),
    )
    restarts: int = 1
    """Of the gateway."""
    starts_again: bool = False
    """Whether a gateway that restarts starts workers too, which takes seconds."""
    timeout: float = 1.5
    """Seconds of silence that the gateway and workers bear."""
    long_freeze: float | None = None
    """Seconds for which one frozen process in ten stands still, the others little longer than
    their silence is borne."""


class Run:
    """One run of chaos, from a seed."""

    def __init__(self, plan: Plan, served: Served, tokenizer: Path, folder: Path) -> None:
        self.plan, self.timeout, self._served = plan, plan.timeout, served
        self.story = Story()
        self.clients: set[Client] = set()
        self._rng = random.Random(plan.seed)
        self._setup = GatewaySetup(
            engine=served.setup,
            tokenizer=find_source(str(tokenizer), weights=False),
            limits=GatewayLimits(request_timeout=_END_SECONDS),
        )
        self.key = random.Random(plan.seed).randbytes(16).hex().encode()
        self._key_file = folder / "key"
        self._key_file.write_bytes(self.key)
        self._network = Network()
        self.crew = Crew(
            self._network,
            folder,
            self._key_file,
            served,
            self.story,
            random.Random(plan.seed),
            self._on_frame,
        )
        self.faults = Faults(self, random.Random(plan.seed))
        judge: type[ExactJudge | LikelyJudge] = ExactJudge if served.exact else LikelyJudge
        drawn = draw_questions(self._rng, plan.questions)
        self._judge: Judge = judge(served, load_tokenizer(self._setup.tokenizer), drawn)
        self._port = 0
        self._cluster: Cluster | None = None
        self._spy: Spy | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._visits: set[asyncio.Future[str | None]] = set()
        self._asked = 0
        self._first_size: dict[int, Size] = {}

    @property
    def cluster(self) -> Cluster:
        assert self._cluster is not None
        return self._cluster

    @property
    def fleet(self) -> Any:
        return self.cluster.fleet

    async def go(self) -> None:
        """The whole run."""
        self._loop = asyncio.get_running_loop()
        plan, story = self.plan, self.story
        try:
            await self._open(prefill=plan.prefill, decode=plan.decode)
            for name, role, path in plan.joiners:
                self.crew.add(name, role, path)
            await self._all_back()
            story.tell(f"begins, {len(self.fleet.members)} workers")
            story.began = time.monotonic()
            restarts = [plan.seconds * (i + 1) / (plan.restarts + 1) for i in range(plan.restarts)]
            while story.seconds < plan.seconds and not story.violations:
                await self._round()
                if restarts and story.seconds > restarts[0]:
                    del restarts[0]
                    await self._restart()
            if not story.violations:
                await self._last_round()
        finally:
            self.faults.disarm()
            await self._close()

    def parts(self) -> list[int]:
        """Numbers of parts of requests that are under way."""
        return list(self.fleet._dispatcher._flights)

    def addresses(self) -> list[tuple[str, int]]:
        """All ports of the service."""
        peers = [member.ready.peer for member in self.fleet.members if member.ready is not None]
        return [("127.0.0.1", self._port), *((peer.host, peer.port) for peer in peers)]

    def visit(self, visit: Callable[..., str | None], *args: object) -> None:
        """Has a stranger come, in a thread."""
        assert self._loop is not None
        visiting = self._loop.run_in_executor(None, visit, *args)
        self._visits.add(visiting)
        visiting.add_done_callback(self._visited)

    def may_kill_local(self, member: Member) -> bool:
        """Whether another worker that was started here would be left."""
        return sum(other.local and other.takes_requests for other in self.fleet.members) > 1

    def signal_local(self, member: Member, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.hello.pid, number)

    def _visited(self, visiting: asyncio.Future[str | None]) -> None:
        self._visits.discard(visiting)
        if (wrong := visiting.result()) is not None:
            self.story.violate("wrong", wrong)

    def _on_frame(self, name: str, trouble: Trouble | None) -> None:
        """In the network's thread."""

        def come() -> None:
            if trouble is not None:
                self.story.fault(trouble, "between pages", f"frame to {name}")
            if self._spy is not None:
                self._spy.frame(name)

        if self._loop is not None:
            self._loop.call_soon_threadsafe(come)

    async def _open(self, *, prefill: int, decode: int) -> None:
        config = ClusterConfig(
            prefill=prefill,
            decode=decode,
            workers=0,
            cluster_port=self._port,
            links=LinkConfig(key_file=self._key_file),
            fleet=FleetConfig(worker_timeout=self.timeout, max_attempts=20),
        )
        making = asyncio.create_task(
            asyncio.to_thread(make_cluster, self._setup, config, drain_timeout=3.0)
        )
        self._cluster = await asyncio.wait_for(making, _BACK_SECONDS)
        assert self._cluster.listener is not None
        host, port = self._cluster.listener.address.rsplit(":", 1)
        if not self._port:
            self._port = int(port)
            self.crew.start((host, self._port))
        self._cluster.start(
            on_failure=lambda: self.story.violate("crashed", str(self.cluster.gateway.failure))
        )
        self._spy = Spy(self._cluster.fleet, self.faults, self.story)

    def _count_parts(self) -> None:
        """What became of the parts that this gateway sent out."""
        self.story.parts.update(msgspec.structs.asdict(self.fleet.counts))

    async def _restart(self) -> None:
        """The gateway ends, by itself or at once, and another takes its place."""
        self._count_parts()
        if self._rng.random() < 0.5:
            self.story.fault("gateway restarts", "any time", "in good order")
            await self.cluster.stop()
        else:
            self.story.fault("gateway restarts", "any time", "at once")
            cluster = self.cluster
            assert cluster.listener is not None
            cluster.listener.close()
            assert cluster.fleet._watch is not None
            cluster.fleet._watch.cancel()
            cluster.fleet.kill()
            cluster.gateway.abort_all()
            await asyncio.to_thread(cluster.fleet.on_stop)
        self.faults.struck.clear()  # nobody is left to notice
        plan = self.plan
        counts = (plan.prefill, plan.decode) if plan.starts_again else (0, 0)
        await self._open(prefill=counts[0], decode=counts[1])
        await self._all_back()

    async def _all_back(self) -> None:
        """Waits until every worker that there is to be takes requests."""
        local = [member.name for member in self.fleet.members if member.local]
        wanted = {*local, *self.crew.joiners}

        def back() -> bool:
            return wanted <= {m.name for m in self.fleet.members if m.state is State.READY}

        if not await until(back, _BACK_SECONDS):
            states = {member.name: member.state.value for member in self.fleet.members}
            self.story.violate("hung", f"of the workers {sorted(wanted)} only {states} are there")

    async def _round(self) -> None:
        """Requests and faults, until all requests have ended and nothing is held."""
        story, rng = self.story, self._rng
        if not await until(lambda: self._ready() >= 2, _BACK_SECONDS):
            story.violate("hung", "workers that were lost do not come back")
            return
        for _ in range(rng.randint(1, self.plan.faults)):
            self.faults.arm(self.faults.draw())
        asking = []
        for _ in range(self.plan.requests):
            asking.append(asyncio.create_task(self._ask(rng.choice(self._judge.questions))))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.05)
        half = asyncio.get_running_loop().call_later(1.0, self.faults.expire)
        await self._end_of(asking)
        half.cancel()
        self.faults.expire()
        await self._quiet()
        await self._judged(asking)

    async def _last_round(self) -> None:
        """After all faults: everybody is back, and every question of many is answered."""
        self.faults.disarm()
        await self._all_back()
        before, questions = self.story.requests["answered"], self._judge.questions
        asking = [
            asyncio.create_task(self._ask(question))
            for question in self._rng.sample(questions, min(20, len(questions)))
        ]
        await self._end_of(asking)
        await self._quiet()
        await self._judged(asking)
        if self.story.requests["answered"] != before + len(asking):
            self.story.violate("lost", "requests failed after all faults were over")

    async def _ask(self, question: Question) -> Answer:
        self._asked += 1
        client = Client(self.cluster.gateway, question, self.story, self._asked)
        self.clients.add(client)
        try:
            return await client.ask()
        finally:
            self.clients.discard(client)

    async def _judged(self, asking: list[asyncio.Task[Answer]]) -> None:
        """Nothing that came is wrong, and everything came where the request was answered."""
        answers = [task.result() for task in asking if task.done() and not task.cancelled()]
        for complaint in await asyncio.to_thread(self._judge.complaints, answers):
            self.story.violate("wrong", complaint)

    async def _end_of(self, asking: list[asyncio.Task[Answer]]) -> None:
        done, left = await asyncio.wait(asking, timeout=_STUCK_SECONDS)
        if left:
            await self._tell_state()
            more, left = await asyncio.wait(left, timeout=_END_SECONDS)
            done |= more
        for task in done:
            task.result()
        for task in left:
            self.story.violate("lost", "a request never ended")
            task.cancel()

    async def _tell_state(self) -> None:
        """What everybody holds of requests that take long, for the story."""
        for flight in self.fleet._flights.values():
            self.story.tell(
                f"request {flight.request.request_id}: parked {flight.parked}, "
                + ", ".join(
                    f"part {part.number} on {tuple(part.route)} for {part.live} begun {part.begun} "
                    f"granted {part.granted} moved {part.moved}"
                    for part in flight.parts.values()
                )
            )
        for held in await self._held():
            self.story.tell(held)
        for member in self.fleet.members:
            self.story.tell(f"worker {member.number} is {member.name}, {member.state}")
        for joiner in self.crew.joiners.values():
            self.crew.signal(joiner, WHERE)
        await asyncio.sleep(1)
        for name in self.crew.joiners:
            self.story.tell(f"{name} wrote:\n{self.crew.log_of(name, 80)}")

    async def _quiet(self) -> None:
        """Waits until no fault goes on, then until nothing of any request is held."""
        longest = 30 + (self.plan.long_freeze or 0)
        if not await until(lambda: self.faults.over and not self._visits, longest):
            self.story.violate("hung", "a stranger is held up for ever")
        began, late = time.monotonic(), 0.0
        held = await self._held()
        while held and time.monotonic() < began + _FREE_SECONDS + late:
            slept = time.monotonic()
            await asyncio.sleep(_LOOK_SECONDS)
            late += time.monotonic() - slept - _LOOK_SECONDS
            held = await self._held()
        if held:
            await self._tell_state()
            self.story.violate("leaked", "; ".join(held))
        self.story.releases.append(time.monotonic() - began)
        self._check_noticed()
        self._measure()

    def _check_noticed(self) -> None:
        """Nobody who was killed or frozen went unnoticed for longer than the silence that is borne,
        up to the next look for it; a gateway that was made to stand still blames nobody for as
        long."""
        most = self.timeout + ALIVE_SECONDS + longest_stall(self.timeout) + _LATE_SECONDS
        now, here = time.monotonic(), {member.number for member in self.fleet.members}
        struck = self.faults.struck.items()
        unnoticed = [(now - when, how) for number, (when, how) in struck if number in here]
        seconds, how = max([*self.story.detections, *unnoticed], default=(0.0, ""))
        if seconds > most:
            self.story.violate("hung", f"{how}, which was not noticed for {seconds:.1f} s")

    async def _held(self) -> list[str]:
        """What is still held of requests, though there are none."""
        fleet = self.fleet
        held = []
        if fleet._flights or fleet._dispatcher._flights or fleet._dispatcher._keys:
            held.append(f"the fleet follows {list(fleet._dispatcher._flights)}")
        for member in fleet.members:
            stats, burden = member.stats, member.burden
            samples = stats.running + stats.waiting + stats.moving + stats.shared
            busy = stats.pages_in_use or samples
            if busy or not member.idle or burden.samples or burden.pages or burden.tokens:
                held.append(f"{member.name}: {stats}, {burden}")
        names = {member.name for member in fleet.members}
        for joiner in self.crew.joiners.values():
            if joiner.pid and joiner.name in names:
                holdings = await self.crew.holdings(joiner)
                if holdings is not None and holdings != Holdings():
                    held.append(f"{joiner.name}: {holdings}")
        return held

    def _measure(self) -> None:
        """Nobody grows."""
        of_gateway = _MOST if self._served.device == "cpu" else _MOST_ON_GPU
        coded = self._served.precision is not Precision.FLOAT32
        of_worker = _MOST_OF_8_BITS if coded and of_gateway is _MOST else of_gateway
        pids = {member.hello.pid: member.name for member in self.fleet.members if member.ready}
        for pid, name in {**pids, os.getpid(): "the gateway"}.items():
            size = size_of(pid)
            if size is None:
                continue
            self.story.sizes.append(size)
            first = self._first_size.setdefault(pid, size)
            most = of_gateway if pid == os.getpid() else of_worker
            if (
                size.descriptors > first.descriptors + most.descriptors
                or size.threads > first.threads + most.threads
                or size.resident_mib > first.resident_mib + most.resident_mib
            ):
                self.story.violate("leaked", f"{name} grew from {first} to {size}")

    def _ready(self) -> int:
        return sum(member.takes_requests for member in self.fleet.members)

    async def _close(self) -> None:
        if self._cluster is not None:
            self._count_parts()
            await self._cluster.stop()
        self.crew.close()
        self._network.close()
        self._judge.close()
