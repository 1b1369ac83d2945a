"""Two schedulers that share requests: one computes prompts, the other answers, pages between them.

As in `scheduling`, a page holds hashes of all tokens up to each place, so a page that is sent too
early, to the wrong place, or given up while it is sent shows as a mismatch.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import Abort, Continue, FinishReason, SamplingParams, Stage, Submit
from fourfold.engine.sequence import Sequence
from fourfold.quadrants.kv_pages import PAGE_TOKENS
from tests.cpu.engine.scheduling import VOCABULARY, Drive, drawn_token, expected_answer

FUZZ = settings(max_examples=120, deadline=None, derandomize=True, phases=[Phase.generate])
STREAM = [7 * i % VOCABULARY for i in range(400)]


class Pair:
    """A prefilling and a decoding scheduler. What they say to each other is on its way in `mail`
    until it is delivered, in any order that the messages of one request allow."""

    def __init__(self, first: Drive, second: Drive, random: Random) -> None:
        self.first, self.second, self.random = first, second, random
        self.requests: dict[int, Submit] = {}
        self.granted: dict[int, Sequence] = {}
        self.sending: set[int] = set()
        self.aborted: set[int] = set()
        self.mail: list[Callable[[], None]] = []
        self.let_go: list[int] = []
        self.on_their_way: set[int] = set()
        """Requests whose first token is in the mail."""
        self.most_moving = 0
        for drive in (first, second):
            drive.scheduler.before_leaving = lambda s, drive=drive: self.leave(drive, s)

    def leave(self, drive: Drive, sequence: Sequence) -> bool:
        """Somebody may still be at its pages, until the mail says otherwise."""
        if drive is self.first:
            self.let_go.append(sequence.request.request_id)
        if sequence.slot < 0 or self.random.random() < 0.5:
            return True
        self.mail.append(lambda: drive.scheduler.left(sequence))
        return False

    def add(self, request: Submit) -> None:
        self.requests[request.request_id] = request
        self.first.add(msgspec.structs.replace(request, stage=Stage.PREFILL))
        self.second.add(msgspec.structs.replace(request, stage=Stage.DECODE))

    def abort(self, request_id: int) -> None:
        self.aborted.add(request_id)
        message = Abort(request_id=request_id)
        for drive in self.random.sample([self.first, self.second], 2):
            drive.abort(message)

    def fail(self, request_id: int) -> None:
        """Its pages cannot be sent, wherever it is."""
        part = self.first.scheduler.part(request_id)
        if part is not None and part.slot >= 0:
            self.aborted.add(request_id)
            self.first.scheduler.drop(part)
            self.second.abort(Abort(request_id=request_id))

    def turn(self) -> None:
        choice = self.random.random()
        if choice < 0.4:
            self.step(self.first)
        elif choice < 0.8:
            self.step(self.second)
        elif self.mail:
            self.mail.pop(self.random.randrange(len(self.mail)))()
        for drive in (self.first, self.second):
            drive.check_ownership()
        self.check_held()

    def check_held(self) -> None:
        """Every sample that has not ended is counted once, but for those that go over just now."""
        drives = (self.first, self.second)
        ended = {
            key
            for drive in drives
            for key, news in drive.news.items()
            if any(output.finish is not None for output in news)
        }
        samples = {
            (request_id, index)
            for drive in drives
            for request_id, request in drive.requests.items()
            for index in range(request.n)
        }
        passing = {(request_id, 0) for request_id in self.on_their_way}
        held = [drive.scheduler.held for drive in drives]
        assert sum(sum(each[:3]) for each in held) == len(samples - ended - passing)
        for drive, each in zip(drives, held, strict=True):
            lists = (drive.scheduler.running, drive.scheduler.waiting, drive.scheduler.moving)
            assert sum(each) == sum(map(len, lists))
            assert min(each) >= 0
        assert held[0].moving == 0
        self.most_moving = max(self.most_moving, held[1].moving)

    def step(self, drive: Drive) -> None:
        before = {key: len(news) for key, news in drive.news.items()}
        drive.step()
        for sequence in drive.scheduler.granted:
            self.granted[sequence.request.request_id] = sequence
        drive.scheduler.granted = []
        if drive is self.first:
            for (request_id, _), news in drive.news.items():
                for output in news[before.get((request_id, 0), 0) :]:
                    if output.token is not None and request_id in self.requests:
                        self.mail.append(self.proceed(request_id, output.token, output.finish))
        for request_id, receiver in self.granted.items():
            sender = self.first.scheduler.part(request_id)
            # It may be computed by a step of which nothing has been read.
            if sender is not None and sender.prefilled and request_id not in self.sending:
                self.sending.add(request_id)
                self.mail.append(lambda s=sender, r=receiver: self.copy(s, r))

    def proceed(self, request_id: int, token: int, finish: FinishReason | None) -> Any:
        self.on_their_way.add(request_id)

        def deliver() -> None:
            self.on_their_way.discard(request_id)
            part = self.second.scheduler.part(request_id)
            if part is None:
                return
            if finish is not None and part.request.n == 1:
                self.second.scheduler.drop(part)
            else:
                message = Continue(request_id=request_id, token=token, finish=finish)
                self.second.scheduler.proceed(part, message)

        return deliver

    def copy(self, sender: Sequence, receiver: Sequence) -> None:
        request_id = sender.request.request_id
        both = (self.first.scheduler.part(request_id), self.second.scheduler.part(request_id))
        if both != (sender, receiver):  # one of them has ended
            return
        found = receiver.computed // PAGE_TOKENS
        for place in range(found, -(-sender.given // PAGE_TOKENS)):
            source, target = sender.pages[place], receiver.pages[place]
            assert self.second.scheduler.pool.owners(target) == 1
            self.second.memory[target] = list(self.first.memory[source])

        def arrive() -> None:
            part = self.second.scheduler.part(request_id)
            if part is not None:
                self.second.scheduler.arrive(part)

        def delivered() -> None:
            part = self.first.scheduler.part(request_id)
            if part is not None:
                self.first.scheduler.deliver(part)

        self.mail += [arrive, delivered]

    def answer(self, request: Submit, index: int) -> tuple[list[int], list[FinishReason | None]]:
        key = (request.request_id, index)
        news = [*self.first.news[key], *self.second.news[key]]
        tokens = [output.token for output in news if output.token is not None]
        return tokens, [output.finish for output in news if output.finish is not None]


def make_pair(random: Random, *, pages: int = 40) -> Pair:
    def drive() -> Drive:
        running = random.choice([1, 2, 5])
        tokens = random.choice([running + 1, running + 40, running + 200])
        config = EngineConfig(
            max_running=running, step_tokens=tokens, prefix_cache=random.random() < 0.8
        )
        return Drive(config, random.choice([7, 12, pages]), depth=random.choice([1, 2]))

    return Pair(drive(), drive(), random)


def story(seed: int, *, aborts: bool) -> Pair:
    random = Random(seed)
    pair = make_pair(random)
    context = min(pair.first.max_context, pair.second.max_context)
    pair.first.scheduler.max_context = pair.second.scheduler.max_context = context
    for request_id in range(random.choice([1, 3, 8])):
        shared = random.choice([0, 1, 63, 64, 65, 128, random.randint(0, 250)])
        own = random.choice([1, 1, 50, 64 - shared % 64])
        prompt = (STREAM[:shared] + [request_id] * own)[: context - 2]
        stops = tuple(random.sample(range(VOCABULARY), random.choice([0, 0, 2, 25])))
        sampling = SamplingParams(max_tokens=random.choice([1, 2, 70]), stop_token_ids=stops)
        n = random.choice([1, 1, 1, 3])
        pair.add(Submit(request_id=request_id, prompt_ids=tuple(prompt), sampling=sampling, n=n))
        for _ in range(random.choice([0, 2, 30])):
            pair.turn()
        if random.random() < 0.3:
            beside = Submit(
                request_id=100 + request_id, prompt_ids=tuple(prompt), sampling=sampling, n=n
            )
            random.choice([pair.first, pair.second]).add(beside)
        if aborts and random.random() < 0.4:
            random.choice([pair.abort, pair.fail])(random.randrange(request_id + 1))
    for _ in range(60_000):
        if pair.first.scheduler.idle and pair.second.scheduler.idle and not pair.mail:
            break
        pair.turn()
    return pair


def check_ended(pair: Pair) -> None:
    for drive in (pair.first, pair.second):
        assert drive.scheduler.idle
        assert drive.scheduler.pool.in_use == 0
    context = pair.second.scheduler.max_context
    for request in pair.requests.values():
        for index in range(request.n):
            tokens, finishes = pair.answer(request, index)
            wanted, reason = expected_answer(request, index, context)
            if request.request_id in pair.aborted:
                assert tokens == wanted[: len(tokens)]
            else:
                assert (tokens, finishes) == (wanted, [reason])
    assert sorted(set(pair.let_go)) == sorted(set(pair.requests))


@given(st.integers(0, 2**32))
@FUZZ
def test_requests_cut_in_two_get_the_answers_they_would_get_whole(seed: int) -> None:
    check_ended(story(seed, aborts=False))


def test_samples_that_wait_for_pages_are_counted() -> None:
    assert max(story(seed, aborts=False).most_moving for seed in range(20)) > 1


@given(st.integers(0, 2**32))
@FUZZ
def test_aborts_leave_nothing_behind(seed: int) -> None:
    check_ended(story(seed, aborts=True))


@pytest.mark.parametrize("generated", [1, 5, 64, 100])
def test_a_sample_goes_on_after_the_tokens_it_has(generated: int) -> None:
    sampling = SamplingParams(max_tokens=120)
    request = Submit(request_id=3, prompt_ids=(4,) * 70, sampling=sampling)
    tokens = tuple(drawn_token(request, 2, 70 + place) for place in range(generated))
    drive = Drive(EngineConfig(max_running=2, step_tokens=80), 8)
    whole = msgspec.structs.replace(request, n=3)
    drive.add(whole)  # for its contents
    drive.abort(Abort(request_id=3))
    drive.news.clear()
    resumed = msgspec.structs.replace(request, index=2, generated=tokens)
    drive.scheduler.add(resumed)
    drive.run()
    answer = [output.token for output in drive.news[3, 2] if output.token is not None]
    wanted, reason = expected_answer(request, 2, drive.max_context)
    assert [*tokens, *answer] == wanted
    assert drive.news[3, 2][-1].finish is reason
    assert all(output.cached_tokens == 0 for output in drive.news[3, 2])


def test_a_prompt_that_is_being_sent_is_never_preempted() -> None:
    config = EngineConfig(max_running=3, step_tokens=300, mixed_tokens=1)
    drive = Drive(config, 6)
    whole = Submit(request_id=1, prompt_ids=(1,) * 100, sampling=SamplingParams(max_tokens=250))
    part = Submit(
        request_id=2, prompt_ids=(2,) * 130, sampling=SamplingParams(), stage=Stage.PREFILL
    )
    drive.add(whole)
    drive.step()
    drive.add(part)
    for _ in range(400):
        drive.step()
    held = drive.scheduler.part(2)
    assert held is not None
    assert held.admissions == 1
    assert len(held.pages) == 3
    assert drive.scheduler.preemptions > 0
    drive.scheduler.drop(held)
    for _ in range(400):
        drive.step()
    answer = [output.token for output in drive.news[1, 0] if output.token is not None]
    assert (answer, FinishReason.LENGTH) == expected_answer(whole, 0, drive.max_context)


def with_a_part_under_way() -> tuple[Drive, Submit, Submit]:
    """The step that computes the last of a prompt for elsewhere is launched and not read yet."""
    drive = Drive(EngineConfig(max_running=3, step_tokens=300), 12, depth=2)
    whole = Submit(request_id=1, prompt_ids=(1,) * 50, sampling=SamplingParams(max_tokens=9))
    part = Submit(
        request_id=2, prompt_ids=(2,) * 130, sampling=SamplingParams(), stage=Stage.PREFILL
    )
    drive.add(whole, part)
    drive.step()
    assert drive.under_way
    return drive, whole, part


def test_pages_that_cannot_be_sent_end_their_part_alone() -> None:
    drive, whole, _ = with_a_part_under_way()
    sequence = drive.scheduler.part(2)
    assert sequence is not None
    drive.scheduler.drop(sequence)
    drive.run()
    assert not drive.news[2, 0]
    answer = [output.token for output in drive.news[1, 0]]
    assert answer == expected_answer(whole, 0, drive.max_context)[0]
    assert drive.scheduler.idle
    assert drive.scheduler.pool.in_use == 0


def test_pages_that_are_delivered_before_a_step_is_read_cost_no_token() -> None:
    drive, _, part = with_a_part_under_way()
    sequence = drive.scheduler.part(2)
    assert sequence is not None
    drive.scheduler.deliver(sequence)
    assert drive.scheduler.part(2) is sequence
    drive.run()
    assert [output.token for output in drive.news[2, 0]] == [drawn_token(part, 0, 130)]
    assert drive.scheduler.part(2) is None
    assert drive.scheduler.pool.in_use == 0


def test_pages_that_are_delivered_before_a_step_is_tried_again_cost_no_token() -> None:
    """They left amid a step that ran out of memory after its last layer."""
    drive = Drive(EngineConfig(max_running=3, step_tokens=300), 12)
    part = Submit(
        request_id=2, prompt_ids=(2,) * 130, sampling=SamplingParams(), stage=Stage.PREFILL
    )
    drive.add(part)
    plan = drive.schedule()
    assert plan is not None
    assert drive.scheduler.retry_smaller(plan)
    sequence = drive.scheduler.part(2)
    assert sequence is not None
    drive.scheduler.deliver(sequence)
    drive.run()
    assert [output.token for output in drive.news[2, 0]] == [drawn_token(part, 0, 130)]
    assert drive.scheduler.part(2) is None
    assert drive.scheduler.pool.in_use == 0
