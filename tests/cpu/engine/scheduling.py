"""Drives a scheduler without a model and checks every step.

The device is played by a dictionary: what stands at (page, offset) is a hash of all tokens up to
there, so that a page lost, shared wrongly, written twice or found by mistake shows as a mismatch.
Tokens are a hash of request, sample and position, so that every answer is known beforehand.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict, deque
from collections.abc import Sequence as Items

from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import Abort, FinishReason, Stage, Submit, TokenLogprob, TokenOutput
from fourfold.engine.page_pool import PagePool
from fourfold.engine.scheduler import Sampled, Scheduler, StepPlan, Work
from fourfold.engine.sequence import Sequence
from fourfold.quadrants.kv_pages import PAGE_TOKENS

VOCABULARY = 50


def drawn_token(request: Submit, index: int, position: int) -> int:
    """The token at `position` of a sample: what model and sampler would answer."""
    return hash((request.request_id, index, position, request.prompt_ids)) % VOCABULARY


def contents(request: Submit, index: int) -> list[int]:
    """For each position of a sample the hash of all tokens up to it."""
    hashes, value = [], 0
    for position in range(len(request.prompt_ids) + request.sampling.max_tokens + 2):
        known = position < len(request.prompt_ids)
        token = request.prompt_ids[position] if known else drawn_token(request, index, position)
        value = hash((value, token))
        hashes.append(value)
    return hashes


def expected_answer(
    request: Submit, index: int, max_context: int
) -> tuple[list[int], FinishReason]:
    tokens: list[int] = []
    while True:
        tokens.append(drawn_token(request, index, len(request.prompt_ids) + len(tokens)))
        if tokens[-1] in request.sampling.stop_token_ids:
            return tokens, FinishReason.STOP
        length = len(request.prompt_ids) + len(tokens)
        if len(tokens) >= request.sampling.max_tokens or length >= max_context:
            return tokens, FinishReason.LENGTH


@dataclasses.dataclass
class Drive:
    """A scheduler with `depth` steps under way: 1 commits a step before the next is scheduled."""

    config: EngineConfig
    pages: int
    depth: int = 1
    failures: frozenset[int] = frozenset()
    """Steps, counted from 0, whose results never come (with `depth` 1)."""

    def __post_init__(self) -> None:
        self.max_context = self.pages * PAGE_TOKENS
        if self.config.max_context is not None:
            self.max_context = min(self.max_context, self.config.max_context)
        self.scheduler = Scheduler(self.config, PagePool(self.pages), self.max_context)
        self.memory: dict[int, list[int | None]] = defaultdict(lambda: [None] * PAGE_TOKENS)
        self.news: dict[tuple[int, int], list[TokenOutput]] = defaultdict(list)
        self.requests: dict[int, Submit] = {}
        self.contents: dict[tuple[int, int], list[int]] = {}
        self.under_way: deque[tuple[StepPlan, list[Sampled]]] = deque()
        self.plans: list[StepPlan] = []

    def add(self, *requests: Submit) -> None:
        for request in requests:
            assert len(request.prompt_ids) < self.max_context
            self.requests[request.request_id] = request
            for index in range(request.n):
                self.contents[request.request_id, index] = contents(request, index)
            self.scheduler.add(request)

    def abort(self, message: Abort) -> None:
        self._hear(self.scheduler.abort(message))
        self.check_ownership()

    def step(self) -> StepPlan | None:
        """Schedules and launches one step; commits the oldest when `depth` are under way."""
        waited = list(self.scheduler.waiting)
        plan = self.schedule()
        self.check_ownership()
        if plan is not None:
            self.check_plan(plan, waited)
            self.plans.append(plan)
            if len(self.plans) - 1 in self.failures:
                self._fail(plan)
                return plan
            self.scheduler.fitted(plan)
            self.under_way.append((plan, [self._compute(work) for work in plan.work]))
        if self.under_way and (plan is None or len(self.under_way) == self.depth):
            self.commit()
        return plan

    def schedule(self) -> StepPlan | None:
        return self.scheduler.schedule()

    def commit(self) -> None:
        """The oldest step under way."""
        self._hear(self.scheduler.commit(*self.under_way.popleft()))
        self.check_ownership()

    def run(self) -> None:
        """Until nothing is left. The oldest sample moves by a token in every step, so the tokens
        of all samples together bound the steps."""
        bound = 10 + sum(
            (len(request.prompt_ids) + request.sampling.max_tokens) * request.n * self.depth
            for request in self.requests.values()
        )
        for _ in range(bound):
            if self.scheduler.idle and not self.under_way:
                return
            self.step()
        raise AssertionError(f"still not idle after {bound} steps")

    def check_plan(self, plan: StepPlan, waited: Items[Sequence]) -> None:
        scheduler, budget = self.scheduler, self.config.step_tokens
        assert 0 < plan.tokens <= budget
        planned = [work.sequence for work in plan.work]
        assert len(set(planned)) == len(planned)
        assert all(sequence in scheduler.running for sequence in planned)
        assert all(work.length == 1 and work.samples for work in plan.decodes)
        assert all(work.samples for work in plan.prefills[:-1]), "a chunk cut short, then another"
        # Nobody rests while there is budget, the oldest never, and nobody is overtaken.
        oldest = scheduler.running[0]
        assert oldest in planned or oldest.pending
        for sequence in scheduler.running:
            prefilled = sequence.stage is Stage.PREFILL and sequence.prefilled
            if sequence not in planned and not sequence.pending and not prefilled:
                assert plan.tokens == budget, "budget left over while a sample waits for it"
        admitted = [s.arrival for s in waited if s in scheduler.running]
        for sequence in waited:
            leader = sequence.leader
            held = leader is not None and leader.finish is None and not leader.prefilled_once
            if sequence in scheduler.waiting and not held:
                assert all(arrival < sequence.arrival for arrival in admitted), "overtaken"

    def check_ownership(self) -> None:
        scheduler = self.scheduler
        pool, running = scheduler.pool, scheduler.running
        holding = [*running, *scheduler.moving.values()]
        slots = [sequence.slot for sequence in holding]
        assert len(set(slots)) == len(slots) <= self.config.max_running
        leaving = scheduler._leaving.values()
        everywhere = [*slots, *(slot for slot, _ in leaving), *scheduler._slots]
        assert sorted(everywhere) == list(range(self.config.max_running))
        assert [s.arrival for s in running] == sorted(s.arrival for s in running)
        assert all(not s.pages and s.slot < 0 and not s.computed for s in scheduler.waiting)
        held = [*(sequence.pages for sequence in holding), *(pages for _, pages in leaving)]
        owners = Counter(page for pages in held for page in pages)
        assert [pool.owners(page) for page in range(pool.total)] == [
            owners[page] for page in range(pool.total)
        ]
        assert pool.in_use == len(owners)
        for sequence in holding:
            assert len(set(sequence.pages)) == len(sequence.pages)
            assert sequence.computed <= len(sequence.pages) * PAGE_TOKENS
            assert sequence.computed <= sequence.length
        assert all(s.finish is None for s in [*running, *scheduler.waiting])
        told = [s for s in [*holding, *scheduler.waiting] if s.prefilled_once]
        assert not any(s.prompt_logprobs for s in told)

    def check_ending(self, aborted: Items[int] = ()) -> None:
        """Every sample ended once, with the answer it would have had alone."""
        scheduler = self.scheduler
        assert scheduler.idle
        assert scheduler.pool.in_use == 0
        assert scheduler.pool.available == self.pages
        for request in self.requests.values():
            for index in range(request.n):
                news = self.news[request.request_id, index]
                finishes = [output.finish for output in news if output.finish is not None]
                assert len(finishes) == 1
                assert news[-1].finish is not None
                answer = [output.token for output in news if output.token is not None]
                wanted, reason = expected_answer(request, index, self.max_context)
                if finishes[0] in (FinishReason.CANCELLED, FinishReason.FAILED):
                    cancelled = finishes[0] is FinishReason.CANCELLED
                    assert request.request_id in aborted if cancelled else self.failures
                    assert news[-1].token is None
                    assert news[-1].error == (None if cancelled else "rubbish")
                    assert answer == wanted[: len(answer)]
                else:
                    assert (answer, finishes) == (wanted, [reason])
            self.check_told(request)

    def check_told(self, request: Submit) -> None:
        """Of a prompt that whoever asked wants to know is told once: with the first token of the
        first sample, or of others if that one ended before."""
        news = [self.news[request.request_id, index] for index in range(request.n)]
        begun = [outputs for outputs in news if outputs[0].token is not None]
        told = [outputs[0].prompt_logprobs for outputs in begun]
        reports = [entries for entries in told if entries is not None]
        assert bool(reports) == (bool(begun) and request.sampling.prompt_logprobs)
        for entries in reports:
            assert [entry.token for entry in entries] == list(request.prompt_ids[1:])
        if news[0][0].token is not None:
            assert not any(told[1:])
        assert all(output.prompt_logprobs is None for outputs in begun for output in outputs[1:])

    def _fail(self, plan: StepPlan) -> None:
        """The device has written rubbish where it should have written keys and values."""
        for work in plan.work:
            for position in range(work.start, work.start + work.length):
                page = work.sequence.pages[position // PAGE_TOKENS]
                self.memory[page][position % PAGE_TOKENS] = None
        self._hear(self.scheduler.fail([work.sequence for work in plan.work], "rubbish"))
        self.check_ownership()

    def _compute(self, work: Work) -> Sampled:
        """What the runner does with a work, on hashes instead of tensors."""
        sequence, request = work.sequence, work.sequence.request
        wanted = self.contents[request.request_id, sequence.index]
        end = work.start + work.length
        if work.samples:
            assert sequence.length == end + 1, "the sampler would draw for another position"
        assert end <= self.max_context
        for position in range(work.start, end):
            page = sequence.pages[position // PAGE_TOKENS]
            assert self.scheduler.pool.owners(page) == 1, "writes into a page that others read"
            self.memory[page][position % PAGE_TOKENS] = wanted[position]
        for place, page in enumerate(sequence.pages[: -(-end // PAGE_TOKENS)]):
            part = wanted[place * PAGE_TOKENS : min(end, (place + 1) * PAGE_TOKENS)]
            assert self.memory[page][: len(part)] == part, "reads what another sequence wrote"
        prompt = request.prompt_ids
        told: Items[int] = ()
        if sequence.wants_prompt_logprobs:
            told = prompt[work.start + 1 : end + 1]
        return Sampled(
            token=drawn_token(request, sequence.index, end) if work.samples else None,
            prompt_logprobs=tuple(TokenLogprob(token, 0.0) for token in told),
        )

    def _hear(self, outputs: Items[TokenOutput]) -> None:
        for output in outputs:
            sample = self.news[output.request_id, output.index]
            assert not sample or sample[-1].finish is None, "news after the end"
            sample.append(output)
