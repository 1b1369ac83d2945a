"""Requests on their way through workers that die, lose pages and speak out of turn."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fourfold.engine.messages import (
    Abort,
    FinishReason,
    Granted,
    Moved,
    Stage,
    Submit,
    TokenLogprob,
    TokenOutput,
)
from tests.cpu.gateway.oracle import World, length, token

PLACES = st.integers(0, 30)


class Journeys(RuleBasedStateMachine):
    """Anything may happen at any time, and every sample still ends once, with its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(n=st.integers(1, 3), routes=st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=4))
    def request(self, n: int, routes: list[tuple[int, int]]) -> None:
        self.world.routes.extend(routes)
        if len(self.world.flights) < 6:
            self.world.request(n)

    @precondition(lambda self: len(self.world.workers) < 4)
    @rule()
    def join(self) -> None:
        self.world.join()

    @precondition(lambda self: self.world.workers)
    @rule(place=PLACES)
    def die(self, place: int) -> None:
        self.world.die(self._pick(sorted(self.world.workers), place))

    @precondition(lambda self: self.world.workers)
    @rule(turns=st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=20), twice=st.booleans())
    def work(self, turns: list[tuple[int, int]], twice: bool) -> None:
        """Workers take messages in, compute, and are heard, in any order."""
        for place, which in turns:
            number = self._pick(sorted(self.world.workers), place)
            worker = self.world.workers[number]
            if worker.inbox and which % 2:
                worker.take()
            elif ready := worker.ready():
                worker.step(*self._pick(ready, which // 2))
            if worker.said and which % 3:
                self.world.hear(number, twice=twice)

    @precondition(lambda self: self.world.grants())
    @rule(place=PLACES)
    def grant(self, place: int) -> None:
        self.world.grant(*self._pick(self.world.grants(), place))

    @precondition(lambda self: self.world.transfers())
    @rule(place=PLACES, fails=st.booleans(), overtakes=st.booleans())
    def transfer(self, place: int, fails: bool, overtakes: bool) -> None:
        transfer = self._pick(self.world.transfers(), place)
        self.world.transfer(*transfer, fails=fails, overtakes=overtakes)

    @precondition(lambda self: self.world.flights)
    @rule(place=PLACES, index=st.none() | st.integers(0, 2), meanwhile=st.booleans())
    def abort(self, place: int, index: int | None, meanwhile: bool) -> None:
        """At once, or while the next part is sent out."""
        number = self._pick(sorted(self.world.flights), place)
        if index is None or index < self.world.flights[number].request.n:
            if meanwhile:
                self.world.meanwhile.append((number, index))
            else:
                self.world.abort(number, index)

    @precondition(lambda self: self.world.workers)
    @rule(place=PLACES, which=PLACES)
    def give_up(self, place: int, which: int) -> None:
        """A worker cancels what nobody asked it to."""
        worker = self.world.workers[self._pick(sorted(self.world.workers), place)]
        if ready := worker.ready():
            worker.end(*self._pick(ready, which), FinishReason.CANCELLED)

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.world.settle()
        self.world.check_end()

    @staticmethod
    def _pick(items: list, place: int):  # type: ignore[no-untyped-def,type-arg]
        return items[place % len(items)]


TestJourneys = Journeys.TestCase
TestJourneys.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_request_cut_in_two_has_all_its_tokens_and_one_transfer() -> None:
    world = World()
    first, last = world.join(), world.join()
    world.routes.append((0, 1))
    flight = world.request(3)
    world.workers[first].take()
    world.workers[last].take()
    assert [h.asked.stage for h in world.workers[first].parts.values()] == [Stage.PREFILL]
    assert [h.asked.stage for h in world.workers[last].parts.values()] == [Stage.DECODE]
    world.settle()
    world.check_end()
    assert flight.done
    assert len(world.opened) == 1, "it was prefilled and sent once"


def test_what_was_delivered_is_not_computed_again() -> None:
    world = World()
    world.join()
    flight = world.request(1)
    request = flight.request.request_id
    while length(request, 0) < 4:  # one with enough tokens
        world.abort(request, None)
        flight = world.request(1)
        request = flight.request.request_id
    [number] = world.workers
    worker = world.workers[number]
    while worker.inbox:
        worker.take()
    part = world.opened[-1].number
    for _ in range(2):
        worker.step(part, 0)
        world.hear(number)
    worker.step(part, 0)  # said, and never heard
    world.die(number)
    assert flight.parked
    world.join()
    asked = world.opened[-1].asked
    assert asked.generated == (token(request, 0, 0), token(request, 0, 1))
    assert (asked.index, asked.n, asked.sampling) == (0, 1, flight.request.sampling)
    world.settle()
    world.check_end()


def test_what_was_ended_waits_for_no_worker() -> None:
    world = World()
    flight = world.request(2)
    request = flight.request.request_id
    for index, waits in ((0, True), (1, False)):
        assert flight.parked
        world.abort(request, index)
        assert flight.parked is waits
    world.settle()
    world.check_end()


def test_samples_that_have_tokens_go_on_one_by_one() -> None:
    world = World()
    number = world.join()
    flight = world.request(2)
    world.workers[number].take()
    part = world.opened[-1].number
    world.workers[number].step(part, 1)
    world.hear(number)
    world.die(number)
    world.join()
    request = flight.request.request_id
    heard = tuple(world.heard[request, 1])
    asked = [(p.asked.index, p.asked.n, p.asked.generated) for p in world.opened[1:]]
    assert asked == [(0, 1, ()), (1, 1, heard)]
    world.settle()
    world.check_end()


def test_a_worker_that_has_sent_the_pages_is_needed_no_more() -> None:
    world = World()
    first, last = world.join(), world.join()
    world.routes.append((0, 1))
    flight = world.request(2)
    part = world.opened[-1].number
    world.workers[first].take()
    world.workers[last].take()
    world.grant(last, part)
    world.hear(last)
    world.workers[first].take()
    world.workers[first].step(part, flight.request.index)
    world.transfer(first, part)
    while world.workers[first].said:
        world.hear(first)
    late = Moved(request_id=part, error="its line was cut")
    flight.moved(first, late)
    world.die(first)
    world.settle()
    world.check_end()
    assert len(world.opened) == 1


@pytest.mark.parametrize("moves", [False, True])
def test_a_first_token_that_is_the_last_leaves_nothing_where_pages_went(moves: bool) -> None:
    world = World()
    first, last = world.join(), world.join()
    world.routes.append((0, 1))
    flight = world.request(1)
    part, request = world.opened[-1].number, flight.request.request_id
    flight.granted(last, Granted(request_id=part))
    if moves:
        flight.moved(first, Moved(request_id=part))
    only = TokenOutput(
        request_id=part, index=0, token=token(request, 0, 0), finish=FinishReason.STOP
    )
    flight.hear(part, first, only)
    assert flight.done
    assert world.workers[last].inbox[-1] == Abort(request_id=part)


def test_what_the_decoding_worker_says_of_pages_counts() -> None:
    """The sender may take for delivered what the receiver could not put where it belongs."""
    world = World()
    first, last = world.join(), world.join()
    world.routes.append((0, 1))
    flight = world.request(1)
    part = world.opened[-1].number
    flight.moved(first, Moved(request_id=part))
    flight.moved(last, Moved(request_id=part, error="no memory"))
    assert part not in flight.parts
    world.settle()
    world.check_end()


def test_pages_that_came_are_no_use_where_no_first_token_will_come() -> None:
    """A sender that cannot tell whether they came ends its part, amid the step that draws it."""
    world = World()
    first, last = world.join(), world.join()
    world.routes.append((0, 1))
    flight = world.request(1)
    part = world.opened[-1].number
    flight.granted(last, Granted(request_id=part))
    flight.moved(last, Moved(request_id=part))
    flight.moved(first, Moved(request_id=part, error="its line was cut"))
    assert part not in flight.parts
    world.settle()
    world.check_end()


def test_a_request_that_kills_every_worker_fails_in_the_end() -> None:
    world = World(max_attempts=3)
    flight = world.request(2)
    for attempt in range(3):
        assert not flight.done, attempt
        world.die(world.join())
    assert flight.done
    for index in (0, 1):
        [end] = world.ends[flight.request.request_id, index]
        assert end.finish is FinishReason.FAILED
        assert end.error == "it was tried 3 times in a row; at last, it died"


def test_many_workers_that_die_together_are_not_many_attempts() -> None:
    world = World(max_attempts=3)
    numbers = [world.join() for _ in range(8)]
    flight = world.request(2)
    for number in numbers:
        world.die(number)
    assert flight.parked
    assert flight.rests
    world.join()
    assert not flight.rests
    world.settle()
    world.check_end()


def test_a_new_token_is_a_new_start() -> None:
    world = World(max_attempts=3)
    flight = world.request(1)
    request = flight.request.request_id
    for place in range(length(request, 0)):
        world.die(world.join())
        number = world.join()
        worker = world.workers[number]
        worker.take()
        worker.step(world.opened[-1].number, 0)
        world.hear(number)
        if not flight.done:
            world.die(number)
        assert len(world.heard[request, 0]) == place + 1
    world.check_end()


def test_losses_that_nobody_is_to_blame_for_do_not_count() -> None:
    world = World(max_attempts=1)
    flight = world.request(1)
    for _ in range(3):
        worker = world.join()
        del world.workers[worker]
        flight.lost(worker, "it leaves", blame=False)
    assert not flight.done
    world.settle()
    world.check_end()


def test_a_failure_of_the_engine_is_the_requests() -> None:
    world = World()
    number = world.join()
    flight = world.request(2)
    world.workers[number].take()
    part = world.opened[-1].number
    flight.hear(
        part,
        number,
        TokenOutput(request_id=part, index=1, finish=FinishReason.FAILED, error="a sentence"),
    )
    ends = [world.ends[flight.request.request_id, index] for index in (0, 1)]
    assert [end.error for [end] in ends] == ["a sentence"] * 2
    world.settle()
    assert not world.workers[number].parts, "the other sample was aborted"


def test_no_sample_tells_of_a_prompt_that_another_has_told_of() -> None:
    world = World()
    number = world.join()
    while True:
        flight = world.request(2, logprobs=True)
        request = flight.request.request_id
        if length(request, 0) > 1:
            break
        flight.abort(Abort(request_id=request))
    part = world.opened[-1].number
    assert world.opened[-1].asked.sampling.prompt_logprobs
    output = TokenOutput(request_id=part, index=0, token=token(request, 0, 0))
    flight.hear(part, number, output)
    world.die(number)
    world.join()
    asked = [opened.asked for opened in world.opened[-2:]]
    assert [(each.index, len(each.generated)) for each in asked] == [(0, 1), (1, 0)]
    assert not any(each.sampling.prompt_logprobs for each in asked)
    flight.abort(Abort(request_id=request))


def test_logprobs_of_the_prompt_are_told_once() -> None:
    told: list[TokenOutput] = []
    world = World()
    deliver = world.deliver
    world.deliver = lambda output: (told.append(output), deliver(output))[1]  # type: ignore[method-assign]
    number = world.join()
    while True:
        flight = world.request(1, logprobs=True)
        if length(flight.request.request_id, 0) > 2:
            break
        flight.abort(Abort(request_id=flight.request.request_id))
    part, first = world.opened[-1].number, (TokenLogprob(5, -1.0),)
    for _ in range(2):
        token_of = token(flight.request.request_id, 0, len(told))
        output = TokenOutput(
            request_id=part, index=0, token=token_of, prompt_logprobs=first, cached_tokens=64
        )
        flight.hear(part, number, output)
    assert [(output.prompt_logprobs, output.cached_tokens) for output in told] == [
        (first, 64),
        (None, 0),
    ]
    world.die(number)
    world.join()
    again: Submit = world.opened[-1].asked
    assert not again.sampling.prompt_logprobs
    assert flight.request.sampling.prompt_logprobs
    flight.abort(Abort(request_id=flight.request.request_id))


def test_what_is_not_for_a_worker_to_say_is_not_heard() -> None:
    world = World()
    first, last = world.join(), world.join()
    world.routes.append((0, 1))
    flight = world.request(1)
    part = world.opened[-1].number
    request = flight.request.request_id
    early = TokenOutput(request_id=part, index=0, token=99)
    flight.hear(part, last, early)
    flight.hear(part, last + 1, early)
    flight.hear(part + 1, first, early)
    flight.hear(
        part, first, msg := TokenOutput(request_id=part, index=0, token=token(request, 0, 0))
    )
    flight.hear(part, first, msg)
    assert world.heard[request, 0] == [token(request, 0, 0)]
    flight.abort(Abort(request_id=request))


@pytest.mark.parametrize("index", [0, 1])
def test_an_aborted_sample_leaves_the_others_running(index: int) -> None:
    world = World()
    world.join()
    world.join()
    world.routes.append((0, 1))
    flight = world.request(2)
    world.abort(flight.request.request_id, index)
    assert not flight.done
    world.settle()
    world.check_end()


@pytest.mark.parametrize("route", [(0, 0), (0, 1)])
def test_what_ends_while_it_is_sent_out_leaves_nothing(route: tuple[int, int]) -> None:
    world = World()
    first, last = world.join(), world.join()
    world.routes.extend([(0, 1), route])
    flight = world.request(1)
    world.meanwhile.append((flight.request.request_id, None))
    flight.moved(last, Moved(request_id=world.opened[-1].number, error="its line was cut"))
    assert len(world.opened) == 2
    assert not flight.parts
    number = world.opened[-1].number
    for worker in {first, world.opened[-1].route.decode}:
        assert world.workers[worker].inbox[-1] == Abort(request_id=number)
    world.settle()
    world.check_end()
