"""The scheduler under random requests, budgets, memory and aborts."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import (
    Abort,
    Continue,
    FinishReason,
    SamplingParams,
    Stage,
    Submit,
)
from fourfold.engine.page_pool import PagePool
from fourfold.engine.scheduler import Sampled, Scheduler, StepPlan
from fourfold.quadrants.kv_pages import PAGE_TOKENS
from tests.cpu.engine.scheduling import VOCABULARY, Drive, expected_answer

# A story is one random number, so there is nothing to shrink.
FUZZ = settings(max_examples=150, deadline=None, derandomize=True, phases=[Phase.generate])
STREAMS = [[(7 * i + 13 * s) % VOCABULARY for i in range(400)] for s in range(2)]


@dataclasses.dataclass(frozen=True)
class Story:
    """Who comes when, who is sent away when, which steps fail, and what there is to share."""

    config: EngineConfig
    pages: int
    arrivals: tuple[tuple[int, Submit], ...]
    aborts: tuple[tuple[int, Abort], ...]
    failures: frozenset[int]

    def play(self, depth: int) -> Drive:
        drive = Drive(self.config, self.pages, depth, self.failures if depth == 1 else frozenset())
        for step in range(1 + max(step for step, _ in [*self.arrivals, *self.aborts])):
            drive.add(*(request for at, request in self.arrivals if at == step))
            for at, message in self.aborts:
                if at == step:
                    drive.abort(message)
            drive.step()
        drive.run()
        drive.check_ending([message.request_id for _, message in self.aborts])
        return drive


def request(request_id: int, prompt: int, n: int = 1, **sampling: Any) -> Submit:
    """A prompt of `prompt` tokens that no other request begins with."""
    prompt_ids = tuple([request_id] * prompt)
    return Submit(
        request_id=request_id, prompt_ids=prompt_ids, sampling=SamplingParams(**sampling), n=n
    )


def random_request(request_id: int, random: Random, max_context: int) -> Submit:
    """Prompts of one stream share a prefix as long as the shorter; a suffix sets some apart."""
    shared = random.choice([0, 1, 40, 50, 60, 63, 64, 65, 128, random.randint(0, 250)])
    suffix = random.choice([0, 0, 0, 1, 50])
    prompt = random.choice(STREAMS)[:shared] + [request_id] * suffix
    return Submit(
        request_id=request_id,
        prompt_ids=tuple(prompt[: max_context - 1] or [3]),
        n=random.choice([1, 1, 2, 3]),
        sampling=SamplingParams(
            max_tokens=random.choice([1, 20, 70, 150, 150]),
            stop_token_ids=random.choice([(), (), (), (5,)]),
            prompt_logprobs=random.random() < 0.3,
        ),
    )


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Drawn from one number each: hypothesis's own small choices would seldom crowd."""
    return random_story(Random(draw(st.integers(0, 2**32))))


def random_story(random: Random) -> Story:
    max_running = random.choice([1, 2, 6, 6])
    pages = random.choice([2, 4, 5, 6, 7, 12])
    config = EngineConfig(
        max_running=max_running,
        step_tokens=max_running + random.choice([1, 2, 17, 100, 200]),
        max_context=random.choice([None, None, 20, 100, 200]),
        prefix_cache=random.random() < 0.7,
    )
    max_context = min(config.max_context or 10**6, pages * PAGE_TOKENS)
    count = random.randint(2, 8)
    requests = [random_request(i, random, max_context) for i in range(count)]
    aborts = [
        Abort(request_id=random.randrange(count), index=random.choice([None, 0, 1]))
        for _ in range(random.randrange(4))
    ]
    return Story(
        config,
        pages,
        tuple((random.randrange(30), request) for request in requests),
        tuple((random.randrange(200), message) for message in aborts),
        frozenset(random.randrange(100) for _ in range(random.choice([0, 0, 1, 2]))),
    )


@FUZZ
@given(stories())
def test_every_sample_ends_once_with_its_own_answer(story: Story) -> None:
    story.play(depth=1)


@FUZZ
@given(stories())
def test_a_step_can_be_scheduled_before_the_last_is_read(story: Story) -> None:
    story.play(depth=2)


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_that_do_not_fit_cost_nobody_an_answer(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those under way are read before the next is tried, and one sample alone always fits."""
    # It wants steps that use all the budget that was asked for.
    monkeypatch.setattr(Drive, "check_plan", lambda *_: None)
    taken_back = 0
    for seed in range(100):
        random = Random(seed)
        story = dataclasses.replace(random_story(random), failures=frozenset())

        def schedule(drive: Drive, random: Random = random) -> StepPlan | None:
            nonlocal taken_back
            scheduler = drive.scheduler
            while (plan := Scheduler.schedule(scheduler)) is not None:
                if len(scheduler.running) == 1 or random.random() < 0.8:
                    break
                assert scheduler.retry_smaller(plan)
                taken_back += 1
                while drive.under_way:
                    drive.commit()
            return plan

        monkeypatch.setattr(Drive, "schedule", schedule)
        story.play(depth)
    assert taken_back > 80


def test_two_steps_ahead_still_decode_in_every_step() -> None:
    config = EngineConfig(max_running=1, step_tokens=2)
    drive = Drive(config, pages=2, depth=2)
    drive.add(request(0, 1, max_tokens=10))
    drive.run()
    drive.check_ending()
    assert [plan.tokens for plan in drive.plans[:10]] == [1] * 10


def test_a_stop_token_one_step_behind_discards_what_was_begun_after_it() -> None:
    """The step begun before the stop token was read computes one token too many, for nobody."""
    drive = Drive(EngineConfig(max_running=1, step_tokens=2), pages=2, depth=2)
    stops = expected_answer(request(0, 1, max_tokens=9), 0, 128)[0][:1]
    drive.add(request(0, 1, max_tokens=9, stop_token_ids=tuple(stops)))
    drive.add(request(1, 1, max_tokens=3))
    drive.run()
    drive.check_ending()
    assert [output.finish for output in drive.news[0, 0]] == [FinishReason.STOP]
    assert drive.plans[1].work[0].sequence.request.request_id == 0


def test_the_ends_of_a_story_are_reached() -> None:
    """The random stories preempt, find prefixes and end in every way there is."""
    preemptions, cached, reasons = 0, 0, set()
    for seed in range(60):
        drive = random_story(Random(seed)).play(depth=1)
        preemptions += drive.scheduler.preemptions
        news = [output for outputs in drive.news.values() for output in outputs]
        cached += sum(output.cached_tokens for output in news)
        reasons |= {output.finish for output in news}
    assert preemptions >= 10
    assert cached >= 64 * 10
    assert reasons == {None, *FinishReason}


def test_a_long_prompt_is_not_overtaken_while_it_waits_for_pages() -> None:
    drive = Drive(EngineConfig(max_running=4, step_tokens=300), pages=4)
    drive.add(request(0, 100, max_tokens=20))
    drive.step()
    drive.add(request(1, 250, max_tokens=2), request(2, 5, max_tokens=2))
    drive.run()
    firsts = [work.sequence.request.request_id for plan in drive.plans for work in plan.prefills]
    assert firsts == [0, 1, 2]
    drive.check_ending()


def test_a_long_prompt_moves_in_every_step_while_others_decode() -> None:
    drive = Drive(EngineConfig(max_running=8, step_tokens=9), pages=40)
    drive.add(*(request(i, 1, max_tokens=100) for i in range(7)))
    drive.step()
    drive.add(request(7, 150, max_tokens=1))
    for _ in range(75):
        plan = drive.step()
        assert plan is not None
        assert len(plan.decodes) == 7
        assert [work.length for work in plan.prefills] == [2]
    assert drive.news[7, 0][-1].finish is FinishReason.LENGTH
    drive.run()
    drive.check_ending()


@pytest.mark.parametrize(("multiple", "chunk"), [(1, 5), (13, 13)])
def test_a_prompt_takes_small_chunks_only_beside_answers(multiple: int, chunk: int) -> None:
    config = EngineConfig(max_running=4, step_tokens=200, mixed_tokens=5)
    scheduler = Scheduler(config, PagePool(20), 20 * PAGE_TOKENS, chunk_multiple=multiple)
    scheduler.add(request(0, 128, max_tokens=2))
    plans = []
    for step in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        plans.append([work.length for work in plan.work])
        scheduler.commit(plan, [Sampled(token=3 if work.samples else None) for work in plan.work])
        if not step:
            scheduler.add(request(1, 39, max_tokens=2))
    assert plans == [[128], [1, chunk], [39 - chunk]]


def one_that_decodes(config: EngineConfig, *, pages: int = 20, prompt: int = 8) -> Scheduler:
    scheduler = Scheduler(config, PagePool(pages), 20 * PAGE_TOKENS)
    scheduler.add(request(0, prompt, max_tokens=100))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, [Sampled(token=3)])
    return scheduler


@pytest.mark.parametrize(
    ("prompts", "beside"),
    [([79], 10), ([80], 20), ([40, 40], 20), ([159], 20), ([100, 60], 40), ([200, 200], 40)],
)
def test_more_of_prompts_that_queue_is_taken_beside_answers(
    prompts: list[int], beside: int
) -> None:
    config = EngineConfig(max_running=4, step_tokens=200, mixed_tokens=10)
    scheduler = one_that_decodes(config)
    for number, length in enumerate(prompts, start=1):
        scheduler.add(request(number, length, max_tokens=2))
    plan = scheduler.schedule()
    assert plan is not None
    assert (len(plan.decodes), plan.tokens) == (1, 1 + beside)


def test_what_is_known_of_prompts_that_queue_is_not_counted() -> None:
    """Ten of 150 tokens of which 128 are pages of the prefix cache: 220 are left, and not 1500."""
    config = EngineConfig(max_running=12, step_tokens=200, mixed_tokens=20)
    scheduler = one_that_decodes(config, pages=60, prompt=140)
    for number in range(1, 11):
        known = request(0, 140).prompt_ids
        own = Submit(
            request_id=number,
            prompt_ids=(*known, *[number] * 10),
            sampling=SamplingParams(max_tokens=2),
        )
        scheduler.add(own)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.tokens == 1 + 40


def test_nor_is_what_only_another_engine_computes() -> None:
    config = EngineConfig(max_running=8, step_tokens=200, mixed_tokens=10)
    scheduler = one_that_decodes(config)
    scheduler.add(msgspec.structs.replace(request(1, 200), stage=Stage.DECODE))
    scheduler.add(request(2, 60, max_tokens=2))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.tokens == 1 + 10


def test_a_prompt_that_has_begun_is_part_of_the_queue() -> None:
    config = EngineConfig(max_running=2, step_tokens=200, mixed_tokens=10, prefix_cache=False)
    scheduler = one_that_decodes(config)
    scheduler.add(request(1, 200, max_tokens=2))
    lengths = []
    for _ in range(6):
        plan = scheduler.schedule()
        assert plan is not None
        lengths.append(plan.tokens - 1)
        scheduler.commit(plan, [Sampled(token=3 if work.samples else None) for work in plan.work])
    assert lengths == [40, 40, 20, 20, 20, 10]


def test_samples_that_wait_for_their_leader_are_no_queue() -> None:
    config = EngineConfig(max_running=8, step_tokens=200, mixed_tokens=10)
    scheduler = one_that_decodes(config)
    scheduler.add(request(1, 60, n=3, max_tokens=2))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.tokens == 1 + 10


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    """Three samples of one page each come to need two, of five; a fourth waits for a slot."""
    drive = Drive(EngineConfig(max_running=3, step_tokens=200, prefix_cache=False), pages=5)
    drive.add(*(request(i, 60, max_tokens=20) for i in range(4)))
    for _ in range(10):
        drive.step()
    assert drive.scheduler.preemptions == 1
    waiting = [sequence.request.request_id for sequence in drive.scheduler.waiting]
    assert waiting == [2, 3]
    drive.run()
    drive.check_ending()


def test_nobody_is_admitted_into_the_next_page_of_those_who_run() -> None:
    """Three pages, one of them in use: a prompt of two would soon be thrown out again."""
    drive = Drive(EngineConfig(max_running=4, step_tokens=300), pages=3)
    drive.add(request(0, 10, max_tokens=20))
    drive.step()
    drive.add(request(1, 100, max_tokens=2))
    drive.run()
    drive.check_ending()
    [admitted] = [i for i, plan in enumerate(drive.plans[1:], 1) if plan.prefills]
    assert admitted == 20
    assert drive.scheduler.preemptions == 0


def slow_prompt_beside_a_long_answer(**sampling: Any) -> Drive:
    """The second sample is thrown out at about 200 of its 250 prompt tokens, when the first needs
    the last page."""
    drive = Drive(EngineConfig(max_running=2, step_tokens=4), pages=6)
    drive.add(request(0, 60, max_tokens=150))
    for _ in range(15):
        drive.step()
    drive.add(request(1, 250, max_tokens=2, **sampling))
    drive.run()
    assert drive.scheduler.preemptions == 1
    return drive


def test_a_prompt_thrown_out_half_way_is_reported_once() -> None:
    slow_prompt_beside_a_long_answer(prompt_logprobs=True).check_ending()


def test_a_prompt_thrown_out_half_way_can_be_found_afterwards() -> None:
    drive = slow_prompt_beside_a_long_answer()
    again = request(1, 250, max_tokens=1)
    drive.add(msgspec.structs.replace(again, request_id=2))
    drive.run()
    drive.check_ending()
    assert drive.news[2, 0][0].cached_tokens == 192


def test_samples_of_one_prompt_share_its_pages() -> None:
    drive = Drive(EngineConfig(max_running=4, step_tokens=400), pages=20)
    drive.add(request(0, 200, max_tokens=3, n=4))
    drive.step()
    drive.step()
    shared = {tuple(sequence.pages[:3]) for sequence in drive.scheduler.running}
    assert len(drive.scheduler.running) == 4
    assert len(shared) == 1
    drive.run()
    drive.check_ending()
    assert [drive.news[0, index][0].cached_tokens for index in range(4)] == [0, 192, 192, 192]


def test_a_sample_outlives_the_one_it_waited_for() -> None:
    drive = Drive(EngineConfig(max_running=4, step_tokens=20), pages=20)
    drive.add(request(0, 100, max_tokens=3, n=3))
    drive.step()
    drive.abort(Abort(request_id=0, index=0))
    drive.run()
    drive.check_ending(aborted=[0])
    assert len(drive.news[0, 1]) == len(drive.news[0, 2]) == 3


def test_aborting_echoes_the_reason_once() -> None:
    drive = Drive(EngineConfig(max_running=1, step_tokens=20), pages=4)
    drive.add(request(0, 30, max_tokens=5, n=2))
    drive.step()
    drive.abort(Abort(request_id=0, reason=FinishReason.STOP))
    drive.abort(Abort(request_id=0, reason=FinishReason.CANCELLED))
    drive.abort(Abort(request_id=99))
    finishes = {sample: [o.finish for o in outputs] for sample, outputs in drive.news.items()}
    assert finishes == {(0, 0): [FinishReason.STOP], (0, 1): [FinishReason.STOP]}
    assert drive.scheduler.idle
    assert drive.step() is None


def test_prompts_wait_where_samples_from_elsewhere_fill_a_smaller_step() -> None:
    """A step that did not fit made the next ones smaller than the samples that then came."""
    drive = Drive(EngineConfig(max_running=8, step_tokens=400), pages=40)
    scheduler = drive.scheduler
    drive.add(request(0, 300, max_tokens=5))
    plan = scheduler.schedule()
    while plan is not None and plan.tokens > 2:
        assert scheduler.retry_smaller(plan)
        plan = scheduler.schedule()
    scheduler.abort(Abort(request_id=0))
    for number in range(1, 5):
        drive.add(msgspec.structs.replace(request(number, 70, max_tokens=9), stage=Stage.DECODE))
    drive.add(request(5, 300, max_tokens=5))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.commit(plan, [Sampled()])
    for sequence in list(scheduler.moving.values()):
        scheduler.arrive(sequence)
        scheduler.proceed(sequence, Continue(request_id=0, token=3))
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.decodes) == 4
    assert not plan.prefills
