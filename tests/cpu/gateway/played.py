"""Real engines and a real fleet without devices, sockets or clocks: what lies between is played.

A device draws tokens that are known beforehand, pages are words between two engines, and everything
that is said waits until the play lets it come: in order on one line, in any order on several.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

import torch

from fourfold.engine.building import ModelFacts
from fourfold.engine.channel import Hello, News, Ready, ToEngine
from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.handover import Arrived, Delivered, Left
from fourfold.engine.messages import (
    Abort,
    Continue,
    EngineStats,
    Granted,
    HandoverNews,
    Role,
    Stage,
    Submit,
    TokenOutput,
)
from fourfold.engine.runner import Launched
from fourfold.engine.scheduler import Sampled, StepPlan, Work
from fourfold.engine.sequence import Sequence
from fourfold.gateway.fleet.fleet import Fleet
from fourfold.gateway.fleet.members import Member, State
from fourfold.quadrants.kv_pages import PAGE_TOKENS
from fourfold.transport.format import PageFormat
from fourfold.transport.peer import Peer

VOCABULARY = 50
PAGES = PageFormat(
    layers=2,
    kv_heads=2,
    head_width=8,
    page_tokens=PAGE_TOKENS,
    code="float32",
    open_code="float32",
    record_bytes=4096,
)


def drawn(request: Submit, index: int, position: int) -> int:
    """The token at a position of a sample, whichever part of the request it is drawn for."""
    return hash((request.prompt_ids, index, position)) % VOCABULARY


class Play:
    """Chance, and all that is on its way between engines."""

    def __init__(self, seed: int, fleet: Fleet) -> None:
        self.random, self.fleet = Random(seed), fleet
        self.calm = False
        """Whether nothing fails any more."""
        self.engines: dict[int, PlayedWorker] = {}
        """Everybody who ever was, by epoch."""
        self._mail: defaultdict[object, deque[Callable[[], None]]] = defaultdict(deque)

    def chance(self, of: float) -> bool:
        """Whether a fault strikes."""
        return not self.calm and self.random.random() < of

    def post(self, line: object, come: Callable[[], None]) -> None:
        self._mail[line].append(come)

    def drop(self, line: object) -> None:
        self._mail.pop(line, None)

    def deliver(self) -> bool:
        """Has the oldest of some line come; False where nothing is on its way."""
        lines = [line for line, mail in self._mail.items() if mail]
        if lines:
            self._mail[self.random.choice(lines)].popleft()()
        return bool(lines)

    def cut(self, one: PlayedWorker, other: PlayedWorker) -> None:
        """The links between two workers break."""
        for end, peer in ((one, other), (other, one)):
            self.drop((end.epoch, peer.epoch))
        for end, peer in ((one, other), (other, one)):
            end.pages.lose(peer.epoch)


class PlayedDevice:
    """Implements `Runner` as far as an engine asks: steps that fail, or are short of memory."""

    device = torch.device("cpu")
    graphs = 0
    usable = True

    def __init__(self, play: Play, pages: int) -> None:
        self.pages = self
        self.chunk_multiple = 1
        self.page_count, self.max_context = pages, pages * PAGE_TOKENS
        self.stored: Callable[[Iterable[int], Iterable[Work]], None] = lambda layers, chunks: None
        self._play = play
        self._tells_early = play.random.random() < 0.7

    def free_memory(self) -> None:
        pass

    def on_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def launch(self, plan: StepPlan) -> Launched:
        play = self._play
        if self._tells_early:
            self.stored(range(PAGES.layers), plan.prefills)
            for _ in range(play.random.choice((0, 0, 6))):
                play.deliver()
        if play.chance(0.03):
            raise MemoryError
        fails = play.chance(0.001)
        ends = [work.start + work.length for work in plan.work]

        def results() -> list[Sampled]:
            if fails:
                raise RuntimeError("the device failed")
            return [
                Sampled(drawn(work.sequence.request, work.sequence.index, end))
                if work.samples
                else Sampled()
                for work, end in zip(plan.work, ends, strict=True)
            ]

        return Launched(results)


@dataclasses.dataclass(eq=False)
class _Sending:
    peer: int
    given: int
    stored: int = 0
    granted: bool = False
    sent: bool = False
    told: bool = False
    over: bool = False


@dataclasses.dataclass(eq=False)
class _Lease:
    writer: int
    begun: bool = False
    over: bool = False


class PlayedPages:
    """Implements `Handover`: who is told what of pages, and when."""

    def __init__(self, play: Play, owner: PlayedWorker) -> None:
        self._play, self._owner = play, owner
        self.sendings: dict[int, _Sending] = {}
        self.leases: dict[int, _Lease] = {}
        self.grants: set[int] = set()

    @property
    def held(self) -> bool:
        return bool(self.sendings or self.leases or self.grants)

    # What an engine asks.

    def expect(self, sequence: Sequence) -> Granted:
        if self._play.chance(0.01):
            raise RuntimeError("pages cannot be received")
        request = sequence.request
        assert request.peer is not None
        assert request.request_id not in self.leases
        self.leases[request.request_id] = _Lease(request.peer.epoch)
        return Granted(request_id=request.request_id, found=sequence.computed // PAGE_TOKENS)

    def land(self, number: int) -> None:
        if self._play.chance(0.01):
            raise RuntimeError("pages cannot be taken in")
        del self.leases[number]

    def grant(self, message: Granted, sequence: Sequence) -> None:
        if (sending := self.sendings.get(message.request_id)) is None:
            self.grants.add(message.request_id)
        else:
            sending.granted = True
            self._advance(message.request_id, sending)

    def stored(self, layers: Iterable[int], chunks: Iterable[Work]) -> None:
        self.computed(chunks)

    def computed(self, chunks: Iterable[Work]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.stage is not Stage.PREFILL or sequence.slot < 0:
                continue
            assert sequence.request.peer is not None
            number = sequence.request.request_id
            sending = self.sendings.setdefault(
                number, _Sending(sequence.request.peer.epoch, sequence.given)
            )
            if number in self.grants:
                self.grants.discard(number)
                sending.granted = True
            sending.stored = max(sending.stored, chunk.start + chunk.length)
            self._advance(number, sending)

    def let_go(self, sequence: Sequence) -> bool:
        number = sequence.request.request_id
        self.grants.discard(number)
        if sequence.stage is Stage.DECODE:
            held = self.leases.pop(number, None) is not None
        elif held := (sending := self.sendings.pop(number, None)) is not None:
            sending.over = True
        if not held or self._play.random.random() < 0.7:
            return True
        self._tell(Left(sequence, None))
        return False

    # What happens to pages on their way.

    def lose(self, peer: int) -> None:
        """The link to a peer, or from it, has broken."""
        for number, sending in list(self.sendings.items()):
            if sending.peer == peer and sending.granted:
                self._delivered(number, sending, "the link broke")
        for number, lease in list(self.leases.items()):
            if lease.writer == peer and lease.begun:
                self._arrived(number, lease, "the link broke")

    def _advance(self, number: int, sending: _Sending) -> None:
        if not sending.granted or sending.sent or sending.told:
            return
        peer = self._play.engines[sending.peer]
        if peer.dead or self._play.chance(0.01):
            self._delivered(number, sending, "pages cannot be sent")
        elif sending.stored == sending.given:
            sending.sent = True
            self._play.post(
                (self._owner.epoch, peer.epoch), lambda: self._arrive(number, sending, peer.pages)
            )

    def _arrive(self, number: int, sending: _Sending, there: PlayedPages) -> None:
        """All pages come, and an answer goes back."""
        lease = there.leases.get(number)
        if sending.over or (lease is not None and lease.over):
            return
        problem = "the checksum is wrong" if self._play.chance(0.03) else None
        if lease is None:
            problem = "nobody expects them"
        else:
            lease.begun = True
            there._arrived(number, lease, problem)
        line = self._owner.epoch, there._owner.epoch
        self._play.post(line, lambda: self._delivered(number, sending, problem))
        if self._play.chance(0.15):  # so that the answer is lost
            self._play.cut(self._owner, there._owner)

    def _arrived(self, number: int, lease: _Lease, problem: str | None) -> None:
        if not lease.over:
            lease.over = True
            self._tell(Arrived(number, problem))

    def _delivered(self, number: int, sending: _Sending, problem: str | None) -> None:
        if not sending.told and not sending.over:
            sending.told = True
            self._tell(Delivered(number, problem))

    def _tell(self, message: Arrived | Delivered | Left) -> None:
        """From a thread of the transport."""
        self._play.post(self._owner.epoch, lambda: self._owner.engine._inbox.put(message))


class PlayedMember(Member):
    """Whose messages wait until the worker takes them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sent: deque[ToEngine] = deque()
        self.on_send: Callable[[ToEngine], None] = lambda message: None

    def send(self, message: ToEngine) -> None:
        if self.state is not State.GONE:
            self.sent.append(message)
            self.on_send(message)


class _NoSocket:
    def setblocking(self, blocking: bool) -> None:
        pass

    def close(self) -> None:
        pass


class PlayedWorker:
    """Implements `engine.worker.Worker`: an engine, and its lines to the gateway."""

    def __init__(self, play: Play, name: str, role: Role) -> None:
        random = play.random
        self.play, self.name, self.role, self.dead = play, name, role, False
        self.epoch = len(play.engines)
        play.engines[self.epoch] = self
        running = random.choice((1, 2, 4))
        config = EngineConfig(
            max_running=running,
            step_tokens=running + random.choice((64, 130, 400)),
            prefix_cache=random.random() < 0.8,
            overlap=random.random() < 0.5,
        )
        device: Any = PlayedDevice(play, random.choice((8, 12, 30)))
        self.engine = Engine(device, config)
        self.pages: Any = PlayedPages(play, self)
        self.engine._handover = self.pages
        self.engine.scheduler.before_leaving = self.pages.let_go
        device.stored = self.pages.stored
        self._news: deque[list[TokenOutput] | HandoverNews] = deque()
        self.engine._tell = self._news.append
        self._line: deque[News] = deque()
        self._told: EngineStats | None = None
        self.join()

    @property
    def here(self) -> bool:
        """Whether the gateway listens to it."""
        return self.member.state is not State.GONE

    @property
    def holds(self) -> str:
        """What it and the gateway have of any request; empty where that is nothing."""
        scheduler, burden = self.engine.scheduler, self.member.burden
        counts = (burden.samples, burden.pages, burden.tokens, scheduler.pool.in_use)
        free = scheduler.idle and not scheduler._parts and not scheduler._leaving
        if free and self.member.idle and not any(counts) and not self.pages.held:
            return ""
        return f"{self.name}: {burden}, {scheduler.held}, {vars(self.pages)}"

    def join(self) -> None:
        """Opens a connection to the gateway, with whatever engine there is."""
        nothing: Any = _NoSocket()
        fleet = self.play.fleet
        self._news.clear()
        self._line.clear()
        self.member = fleet.add(nothing)
        fleet.heard(self.member, Hello(self.name, self.role, 1))
        facts = ModelFacts(
            vocabulary=VOCABULARY, eos_token_ids=(), checkpoint="m", fingerprint="m float32"
        )
        peer = Peer(name=self.name, epoch=self.epoch, host="127.0.0.1", port=1, pages=PAGES)
        context = 8 * PAGE_TOKENS
        fleet.heard(self.member, Ready(facts, context, self.engine.stats, peer, "cpu"))

    def hear(self) -> bool:
        """A message of the gateway comes."""
        assert isinstance(self.member, PlayedMember)
        if not self.member.sent:
            return False
        message = self.member.sent.popleft()
        if isinstance(message, Submit | Abort | Granted | Continue):
            self.engine._inbox.put(message)
        return True

    def turn(self) -> bool:
        """A turn of the engine's thread."""
        came = not self.engine._inbox.empty()
        ended = self.engine.receive()
        outputs = self.engine.step()
        if news := [*(ended or ()), *(outputs or ())]:
            self._news.append(news)
        return came or outputs is not None

    def say(self) -> bool:
        """Tells the gateway what there is, or some of it."""
        stats = self.engine.stats
        if not self._news and stats == self._told:
            return False
        outputs: list[TokenOutput] = []
        handover: list[HandoverNews] = []
        for _ in range(min(len(self._news), self.play.random.choice((1, 2, 1000)))):
            item = self._news.popleft()
            if isinstance(item, list):
                outputs += item
            else:
                handover.append(item)
        self._told = stats
        self._line.append(News(outputs, stats, 0.0, handover))
        return True

    def be_heard(self) -> bool:
        """The gateway hears what it said."""
        if not self._line or not self.here:
            return False
        news = self._line.popleft()
        self.member.stats = news.stats  # without rates, which are of this machine's clock
        self.play.fleet.heard(self.member, news)
        return True

    def part(self) -> None:
        """Its connection is over: some of what was said on it may still come."""
        random = self.play.random
        while random.random() < 0.7 and self.be_heard():
            pass
        self.member.end("its connection was cut")
        while random.random() < 0.7 and self.hear():
            pass
        self.engine.abort_all()
        while random.random() < 0.7:
            self.turn()
        self._news.clear()

    def die(self) -> None:
        """It is killed."""
        while self.play.random.random() < 0.7 and self.be_heard():
            pass
        self.dead = True
        for other in self.play.engines.values():
            if not other.dead:
                self.play.cut(self, other)
        self.member.end("it was killed")
