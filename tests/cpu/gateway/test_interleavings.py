"""A fleet and its engines, in any order that messages may come in, amid all that may fail."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import pytest

from fourfold.engine.building import EngineSetup
from fourfold.engine.channel import Leaving, ToEngine
from fourfold.engine.messages import (
    Abort,
    Continue,
    FinishReason,
    Role,
    SamplingParams,
    Submit,
    TokenOutput,
)
from fourfold.gateway.fleet import fleet as fleet_module
from fourfold.gateway.fleet.config import FleetConfig
from fourfold.gateway.fleet.dispatcher import Counts
from fourfold.gateway.fleet.fleet import Fleet
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.transport.config import TransportConfig
from tests.cpu.gateway.played import VOCABULARY, Play, PlayedMember, PlayedWorker, drawn

RUNS = 200
TURNS = 1500
CREW = (
    ("prefill-0", Role.PREFILL),
    ("decode-0", Role.DECODE),
    ("decode-1", Role.DECODE),
    ("prefill-1", Role.PREFILL),
    ("both", Role.BOTH),
)


def answer(request: Submit, index: int) -> list[int]:
    """All tokens of a sample."""
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_tokens:
        tokens.append(drawn(request, index, len(request.prompt_ids) + len(tokens)))
        if tokens[-1] in request.sampling.stop_token_ids:
            break
    return tokens


class Story:
    """One run, from a seed."""

    def __init__(self, seed: int) -> None:
        source = Source(SourceKind.DIRECTORY, Path("/nowhere"), "model")
        config = FleetConfig(max_attempts=1_000_000)
        self.fleet = Fleet(EngineSetup(source=source), config, TransportConfig(), 5.0)
        self.fleet._emit = self.hear
        self.play = Play(seed, self.fleet)
        self.random = self.play.random
        self.requests: dict[int, Submit] = {}
        self.tokens: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self.ends: dict[tuple[int, int], FinishReason] = {}
        self.left: set[tuple[int, int]] = set()
        """Samples that nobody listens to any more."""
        self.away: list[PlayedWorker] = []
        self.workers: list[PlayedWorker] = []
        for name, role in CREW[: self.random.choice((2, 3, 3, 4, 5))]:
            self.start(name, role)

    def hear(self, outputs: list[TokenOutput], since: float | None = None) -> None:
        for output in outputs:
            sample = output.request_id, output.index
            assert sample not in self.ends, "news after the end"
            if output.token is not None:
                self.tokens[sample].append(output.token)
            if output.finish is not None:
                self.ends[sample] = output.finish

    def start(self, name: str, role: Role) -> None:
        worker = PlayedWorker(self.play, name, role)
        self.workers.append(worker)
        self.watch(worker)

    def watch(self, worker: PlayedWorker) -> None:
        """Clients may leave at any moment, also while something of theirs is sent out."""

        def sent(message: ToEngine) -> None:
            if isinstance(message, Submit | Continue) and self.play.chance(0.01):
                self.leave()

        assert isinstance(worker.member, PlayedMember)
        worker.member.on_send = sent

    def come_back(self, worker: PlayedWorker) -> None:
        self.away.remove(worker)
        worker.join()
        self.watch(worker)

    def go_away(self, worker: PlayedWorker) -> None:
        worker.part()
        self.away.append(worker)

    def leave(self) -> None:
        """A client leaves, or one sample has met its stop string."""
        if self.fleet._flights:
            number = self.random.choice(list(self.fleet._flights))
            n = self.requests[number].n
            index = self.random.choice((None, *range(n)))
            self.left |= {(number, each) for each in (range(n) if index is None else (index,))}
            reason = self.random.choice((FinishReason.CANCELLED, FinishReason.STOP))
            self.fleet.abort(Abort(request_id=number, index=index, reason=reason))

    def ask(self) -> None:
        random, number = self.random, len(self.requests) + 1
        length = random.choice((1, 20, 63, 64, 65, 128, 130, 200))
        prompt = [random.randrange(3), *range(1, length)]
        sampling = SamplingParams(
            max_tokens=random.choice((1, 2, 5, 70)),
            stop_token_ids=tuple(random.sample(range(VOCABULARY), random.choice((0, 0, 3, 20)))),
        )
        request = Submit(
            request_id=number,
            prompt_ids=tuple(prompt),
            sampling=sampling,
            n=random.choice((1, 1, 1, 3)),
        )
        self.requests[number] = request
        self.fleet.submit(request)

    def turn(self) -> None:
        """Something happens."""
        worker = self.random.choice(self.workers)
        if worker.here:
            happens = (worker.hear, worker.turn, worker.say, worker.be_heard, self.play.deliver)
            weights = (20, 15, 15, 20, 25)
            self.random.choices(happens, weights)[0]()
        elif worker not in self.away:  # its drain is over
            self.go_away(worker)
        elif self.random.random() < 0.1:
            self.come_back(worker)
        if len(self.fleet._flights) < 8 and self.random.random() < 0.02:
            self.ask()
        if self.random.random() < 0.02:
            self.fail(worker)

    def fail(self, worker: PlayedWorker) -> None:
        """Somebody leaves, dies, or is given something else to do."""
        kind = self.random.randrange(10)
        if kind < 2:
            self.leave()
        elif kind < 4 and len(self.workers) > 1:
            self.play.cut(*self.random.sample(self.workers, 2))
        elif kind < 6:
            self.try_again()
        elif not worker.here:
            return
        elif kind == 6:
            self.go_away(worker)
        elif kind == 7:
            worker.die()
            self.workers.remove(worker)
            self.start(worker.name, worker.role)
        elif kind == 8:
            self.fleet.set_role(worker.name, self.random.choice(list(Role)))
        elif self.random.random() < 0.3:
            self.fleet.heard(worker.member, Leaving())

    def try_again(self) -> None:
        self.fleet._try_again([flight for flight in self.fleet._flights.values() if flight.rests])

    def settle(self) -> None:
        """Everything that can happen happens, and nothing fails any more."""
        self.play.calm = True
        for _ in range(20_000):
            quiet = True
            for worker in self.workers:
                if not worker.here and worker not in self.away:
                    self.go_away(worker)
                if worker in self.away:
                    self.come_back(worker)
                    quiet = False
            self.try_again()
            while self.play.deliver():
                quiet = False
            for worker in self.workers:
                for happens in (worker.hear, worker.turn, worker.say, worker.be_heard):
                    while happens():
                        quiet = False
            if quiet:
                return
        raise AssertionError("it never became quiet")

    def check(self) -> None:
        """Every sample ended once, with its tokens, and nobody holds anything of any."""
        for number, request in self.requests.items():
            samples = [(number, index) for index in range(request.n)]
            failed = any(self.ends.get(sample) is FinishReason.FAILED for sample in samples)
            for sample in samples:
                wanted, tokens = answer(request, sample[1]), self.tokens[sample]
                assert tokens == wanted[: len(tokens)]
                if sample not in self.left:
                    assert sample in self.ends, f"{sample} never ended: {self.followed}"
                    assert failed or tokens == wanted
        assert not self.fleet._flights
        assert not self.followed
        assert not self.fleet._dispatcher._keys
        assert not [worker.holds for worker in self.workers if worker.holds]

    @property
    def followed(self) -> list[object]:
        return [flight.parts for flight in self.fleet._dispatcher._flights.values()]


def test_nothing_is_lost_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(fleet_module, "Member", PlayedMember)
    total = dict.fromkeys(Counts.__struct_fields__, 0)
    for seed in range(RUNS):
        story = Story(seed)
        try:
            for _ in range(TURNS):
                story.turn()
            story.settle()
            story.check()
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        for name in total:
            total[name] += getattr(story.fleet.counts, name)
    assert total["cut"] > total["whole"] / 4
    assert min(total.values()) > RUNS / 5, "hardly anything failed"
