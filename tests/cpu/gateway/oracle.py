"""Workers without a model: they say the tokens of an oracle, by the rules of real engines."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import msgspec

from fourfold.engine.messages import (
    Abort,
    Continue,
    FinishReason,
    Granted,
    Moved,
    SamplingParams,
    Stage,
    Submit,
    TokenOutput,
)
from fourfold.gateway.fleet.flight import Flight, Part, ToWorker
from fourfold.gateway.fleet.routing import Route

FromWorker = TokenOutput | Granted | Moved


def length(request: int, index: int) -> int:
    """Tokens of a sample's answer."""
    return 1 + (7 * request + 3 * index) % 5


def token(request: int, index: int, place: int) -> int:
    return 10_000 * request + 100 * index + place


def finish(request: int, index: int, place: int) -> FinishReason | None:
    if place + 1 < length(request, index):
        return None
    return FinishReason.LENGTH if index % 2 else FinishReason.STOP


def ask(request: int, n: int, *, logprobs: bool = False) -> Submit:
    sampling = SamplingParams(max_tokens=9, prompt_logprobs=logprobs)
    return Submit(request_id=request, prompt_ids=(request,), sampling=sampling, n=n)


@dataclasses.dataclass
class Holding:
    """A part as one worker holds it: how many tokens each live sample has."""

    asked: Submit
    made: dict[int, int]
    granted: bool = False
    sends: bool = False
    """Pages are on their way."""
    arrived: bool = False
    proceeds: Continue | None = None

    @property
    def leads(self) -> bool:
        """Whether the first sample is here still, and others wait for it."""
        return self.asked.index in self.made

    @property
    def decodes(self) -> bool:
        return self.asked.stage is Stage.WHOLE or not self.leads


class Worker:
    """What one engine holds, and the messages between it and the gateway, in order."""

    def __init__(self) -> None:
        self.parts: dict[int, Holding] = {}
        self.inbox: deque[ToWorker] = deque()
        self.said: deque[FromWorker] = deque()

    def take(self) -> None:
        """Takes in the oldest message."""
        message = self.inbox.popleft()
        if isinstance(message, Submit):
            indices = range(message.index, message.index + message.n)
            if message.stage is Stage.PREFILL:
                indices = range(message.index, message.index + 1)
            made = dict.fromkeys(indices, len(message.generated))
            assert message.request_id not in self.parts
            self.parts[message.request_id] = Holding(message, made)
            return
        holding = self.parts.get(message.request_id)
        if holding is None:
            return
        match message:
            case Abort():
                for index in list(holding.made):
                    if message.index in (None, index):
                        self.end(message.request_id, index, message.reason)
            case Granted():
                holding.granted = True
            case Continue():
                holding.proceeds = message
                self.go_on(message.request_id)

    def end(self, part: int, index: int, reason: FinishReason) -> None:
        """Ends a sample without a token, and says so."""
        self.said.append(TokenOutput(request_id=part, index=index, finish=reason))
        self.drop(part, index)

    def drop(self, part: int, index: int) -> None:
        holding = self.parts[part]
        del holding.made[index]
        if not holding.made:
            del self.parts[part]

    def go_on(self, part: int) -> None:
        """The answer is computed here from now on, if its pages and first token are there."""
        holding = self.parts[part]
        if not holding.arrived or holding.proceeds is None or holding.asked.stage is Stage.WHOLE:
            return
        holding.asked = msgspec.structs.replace(holding.asked, stage=Stage.WHOLE)
        index = holding.asked.index
        if index in holding.made:
            holding.made[index] += 1
            if holding.proceeds.finish is not None:
                self.drop(part, index)

    def ready(self) -> list[tuple[int, int]]:
        """Samples that can have a token now."""
        return [
            (part, index)
            for part, holding in sorted(self.parts.items())
            for index in sorted(holding.made)
            if holding.decodes or (holding.asked.stage is Stage.PREFILL and not holding.sends)
        ]

    def step(self, part: int, index: int) -> None:
        """Says a sample's next token."""
        holding = self.parts[part]
        request, place = holding.asked.prompt_ids[0], holding.made[index]
        ends = finish(request, index, place)
        output = TokenOutput(
            request_id=part, index=index, token=token(request, index, place), finish=ends
        )
        self.said.append(output)
        if holding.asked.stage is Stage.PREFILL:
            holding.sends = True
            if ends is None or holding.asked.n > 1:
                return
        if ends is None:
            holding.made[index] += 1
        else:
            self.drop(part, index)


class World:
    """Implements `Post`: flights, workers, and whatever is on its way between them."""

    def __init__(self, max_attempts: int = 10**6) -> None:
        self.workers: dict[int, Worker] = {}
        self.flights: dict[int, Flight] = {}
        self.owners: dict[int, Flight] = {}
        self.heard: dict[tuple[int, int], list[int]] = {}
        self.ends: dict[tuple[int, int], list[TokenOutput]] = {}
        self.aborted: set[tuple[int, int]] = set()
        self.routes: deque[tuple[int, int]] = deque()
        """Places among the living, modulo how many there are, for the next parts."""
        self.opened: list[Part] = []
        self.meanwhile: list[tuple[int, int | None]] = []
        """Requests and samples that are aborted while the next part is sent out."""
        self._max_attempts = max_attempts
        self._numbers = 0

    # What a flight asks of the fleet.

    def open(self, flight: Flight, asked: Submit) -> Part | None:
        living = sorted(self.workers)
        if not living:
            return None
        first, last = self.routes.popleft() if self.routes else (0, 0)
        route = Route(living[first % len(living)], living[last % len(living)])
        part = Part(self.number(), asked, route, set(range(asked.index, asked.index + asked.n)))
        self.owners[part.number] = flight
        self.opened.append(part)
        submit = msgspec.structs.replace(asked, request_id=part.number)
        if route.whole:
            self.send(route.prefill, submit)
        else:
            self.send(route.prefill, msgspec.structs.replace(submit, stage=Stage.PREFILL))
            self.send(route.decode, msgspec.structs.replace(submit, stage=Stage.DECODE))
        leaving, self.meanwhile = self.meanwhile, []
        for request, index in leaving:
            self.abort(request, index)
        return part

    def began(self, part: Part) -> None:
        pass

    def close(self, part: Part, tokens: Sequence[int]) -> None:
        del self.owners[part.number]

    def hand_over(self, part: Part) -> None:
        assert part.begun
        assert part.moved

    def send(self, worker: int, message: ToWorker) -> None:
        if worker in self.workers:
            self.workers[worker].inbox.append(message)

    def deliver(self, output: TokenOutput) -> None:
        key = output.request_id, output.index
        assert not self.ends.get(key), "a sample that has ended says no more"
        assert key not in self.aborted, "nobody listens any more"
        if output.token is not None:
            self.heard.setdefault(key, []).append(output.token)
        if output.finish is not None:
            self.ends.setdefault(key, []).append(output)

    def avoid(self, route: Route, why: str) -> None:
        pass

    def lost(self, part: Part, why: str) -> None:
        pass

    # What happens.

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def join(self) -> int:
        """A worker comes; returns its number."""
        worker = self.number()
        self.workers[worker] = Worker()
        for flight in self.flights.values():
            flight.try_again()
        return worker

    def die(self, worker: int) -> None:
        del self.workers[worker]
        for flight in list(self.flights.values()):
            flight.lost(worker, "it died")

    def request(self, n: int, *, logprobs: bool = False) -> Flight:
        number = self.number()
        flight = Flight(ask(number, n, logprobs=logprobs), self, self._max_attempts)
        self.flights[number] = flight
        flight.begin()
        return flight

    def abort(self, request: int, index: int | None) -> None:
        flight = self.flights[request]
        indices = range(flight.request.n) if index is None else (index,)
        self.aborted |= {(request, i) for i in indices if not self.ends.get((request, i))}
        flight.abort(Abort(request_id=request, index=index))

    def hear(self, worker: int, *, twice: bool = False) -> None:
        """The gateway hears the oldest that a worker said; `twice` what bears no token."""
        said = self.workers[worker].said.popleft()
        flight = self.owners.get(said.request_id)
        if flight is None:
            return
        match said:
            case TokenOutput():
                flight.hear(said.request_id, worker, said)
            case Granted():
                flight.granted(worker, said)
                if twice:
                    flight.granted(worker, said)
            case Moved():
                flight.moved(worker, said)
                if twice:
                    flight.moved(worker, said)

    def grants(self) -> list[tuple[int, int]]:
        """Parts for whose prompts pages could be reserved now."""
        return [
            (number, part)
            for number, worker in sorted(self.workers.items())
            for part, holding in sorted(worker.parts.items())
            if holding.asked.stage is Stage.DECODE and holding.leads and not holding.granted
        ]

    def grant(self, worker: int, part: int) -> None:
        self.workers[worker].parts[part].granted = True
        self.workers[worker].said.append(Granted(request_id=part))

    def transfers(self) -> list[tuple[int, int]]:
        """Parts whose pages could move now."""
        return [
            (number, part)
            for number, worker in sorted(self.workers.items())
            for part, holding in sorted(worker.parts.items())
            if holding.asked.stage is Stage.PREFILL and holding.granted and holding.sends
        ]

    def transfer(
        self, worker: int, part: int, *, fails: bool = False, overtakes: bool = False
    ) -> None:
        """Pages move, unless the transfer fails or the receiver takes them no more. What is said of
        it may overtake tokens: both come from threads of their own."""
        sender = self.workers[worker]
        del sender.parts[part]
        receivers = [
            other
            for other in self.workers.values()
            if part in other.parts and other.parts[part].asked.stage is Stage.DECODE
        ]
        wanted = bool(receivers) and receivers[0].parts[part].leads
        error = "the line was cut" if fails or not wanted else None
        for said in (sender.said, receivers[0].said) if wanted else (sender.said,):
            moved = Moved(request_id=part, error=error)
            said.appendleft(moved) if overtakes else said.append(moved)
        if wanted and error is None:
            receivers[0].parts[part].arrived = True
            receivers[0].go_on(part)

    def settle(self) -> None:
        """Everything that can happen happens, without further faults."""
        if not self.workers:
            self.join()
        for _ in range(100_000):
            quiet = True
            for flight in self.flights.values():
                if flight.rests:
                    flight.try_again()
                    quiet = False
            for number, worker in list(self.workers.items()):
                while worker.inbox:
                    worker.take()
                    quiet = False
                for part, index in worker.ready():
                    worker.step(part, index)
                    quiet = False
                while worker.said:
                    self.hear(number)
                    quiet = False
            for number, part in self.grants():
                self.grant(number, part)
                quiet = False
            for number, part in self.transfers():
                self.transfer(number, part)
                quiet = False
            if quiet:
                return
        raise AssertionError("it never became quiet")

    def check(self) -> None:
        """Nothing that was delivered is wrong."""
        for (request, index), tokens in self.heard.items():
            expected = [token(request, index, place) for place in range(length(request, index))]
            assert tokens == expected[: len(tokens)]

    def check_end(self) -> None:
        """Every sample has ended as it should, and nobody holds anything."""
        self.check()
        for request, flight in self.flights.items():
            assert flight.done
            assert not flight.parts
            assert not flight.parked
            for index in range(flight.request.n):
                if (request, index) in self.aborted:
                    continue
                last = length(request, index)
                assert len(self.heard[request, index]) == last
                [end] = self.ends[request, index]
                assert end.finish is finish(request, index, last - 1)
        assert not self.owners
        assert not any(worker.parts for worker in self.workers.values())
