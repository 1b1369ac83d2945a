"""What to compute next, decided from host state alone.

Every step carries one token of each decoding sample and fills the rest of its token budget with
chunks of prompts, strictly in order of arrival, so that a long prompt is never overtaken for ever.
A prompt is admitted when pages for all of it are available; when decoding runs out of pages, the
youngest sample gives up its pages and is computed again later.

`schedule` relies on counts only, never on the value of a token that is still on the device, so a
step can be scheduled before the one before it has been read.

Of a request cut in two, the prefilling engine holds the prompt's pages until the other one has
them; the decoding one grants pages in order of arrival, as to any prompt, and computes on when they
have come. Both kinds are `moving` meanwhile: they are not scheduled and never preempted.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fourfold.engine.config import EngineConfig
from fourfold.engine.limit import Limit
from fourfold.engine.messages import (
    Abort,
    Continue,
    FinishReason,
    Stage,
    Submit,
    TokenLogprob,
    TokenOutput,
)
from fourfold.engine.mixing import mixed_budget, mixed_sizes
from fourfold.engine.page_pool import ROOT_KEY, PagePool
from fourfold.engine.sequence import Sequence
from fourfold.quadrants.kv_pages import PAGE_TOKENS


class Work(NamedTuple):
    """Tokens `start : start + length` of a sequence; `samples` if the next token is then drawn."""

    sequence: Sequence
    start: int
    length: int
    samples: bool

    @property
    def prompt_tokens(self) -> int:
        """How many of these tokens are the prompt's."""
        left = self.sequence.prompt_length - self.start
        return min(self.length, left) if left > 0 else 0


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step: decode rows (length 1, all sampling), then prompt chunks, in row order."""

    decodes: tuple[Work, ...]
    prefills: tuple[Work, ...]

    @property
    def work(self) -> tuple[Work, ...]:
        return self.decodes + self.prefills

    @property
    def tokens(self) -> int:
        return sum(work.length for work in self.work)


class Sampled(NamedTuple):
    """What the device answers for one `Work`: a token where it sampled, logprobs where asked."""

    token: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Held(NamedTuple):
    """How many samples an engine holds, as `EngineStats` has them."""

    running: int
    waiting: int
    moving: int
    shared: int


class Scheduler:
    """All samples of one engine, waiting or running. Used by the engine's thread alone."""

    def __init__(
        self, config: EngineConfig, pool: PagePool, max_context: int, *, chunk_multiple: int = 1
    ) -> None:
        self._config = config
        self._chunk_multiple = chunk_multiple
        self.pool = pool
        self.max_context = max_context
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.moving: dict[int, Sequence] = {}
        self.granted: list[Sequence] = []
        """Those that hold pages now and wait for what belongs in them; for the engine to take."""
        self.before_leaving: Callable[[Sequence], bool] = lambda sequence: True
        """Called before the pages of a part of a request are given up; False where others still
        read or write them, so that nobody may have them before `left`."""
        self.preemptions = 0
        self._leaving: dict[Sequence, tuple[int, list[int]]] = {}
        """Slots and pages of parts that have ended, which others still read or write."""
        self._parts: dict[int, Sequence] = {}
        """By their requests, those that are computed here in part."""
        self.tokens = Limit(config.tokens, max(config.tokens // 16, chunk_multiple))
        """Of a step. Falls, as the samples of one do, where a step does not fit into memory."""
        self._samples = Limit(config.running, 1)
        self._slots = list(reversed(range(config.running)))
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running and not self.moving

    @property
    def held(self) -> Held:
        """What is here. A sample that is cut in two is counted by the prefilling engine until its
        next token is known, then by the decoding one; to the other it is shared."""
        waiting, moving = len(self.waiting), 0
        for part in self._parts.values():
            if part.stage is Stage.DECODE:
                here = part.proceeds is not None and part.proceeds.finish is None
                admitted = part.slot >= 0
                waiting -= not here and not admitted
                moving += here and admitted
        shared = len(self.waiting) + len(self.moving) - waiting - moving
        return Held(len(self.running), waiting, moving, shared)

    def add(self, request: Submit) -> list[TokenOutput]:
        """Queues every sample of a request; samples after the first wait for its prompt.

        A prompt that is empty or could never fit would wait for ever at the head of the queue; its
        samples fail at once, and that is the news returned.
        """
        length = len(request.prompt_ids)
        given = length + len(request.generated)
        here = 1 if request.stage is Stage.PREFILL else request.n
        indices = range(request.index, request.index + here)
        if not 0 < given < self.max_context:
            return [
                TokenOutput(
                    request_id=request.request_id,
                    index=index,
                    finish=FinishReason.FAILED,
                    error=f"a prompt of {given} tokens cannot be computed; send 1 to "
                    f"{self.max_context - 1}",
                )
                for index in indices
            ]
        leader: Sequence | None = None
        # Without a prefix cache only the samples of one request find each other's pages.
        own = self._arrivals.to_bytes(8) if here > 1 else None
        root = ROOT_KEY if self._config.prefix_cache else own
        for index in indices:
            longest = min(length + request.sampling.max_tokens, self.max_context)
            sequence = Sequence(request, index, self._arrivals, leader, longest, root)
            if leader is None:
                sequence.found = PAGE_TOKENS * len(self._known_pages(sequence))
            self._arrivals += 1
            self.waiting.append(sequence)
            if sequence.stage is not Stage.WHOLE:
                self._parts[request.request_id] = sequence
            leader = leader or sequence
        return []

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute. Counts its tokens as computed."""
        decodes = self._schedule_decodes()
        begun = [sequence for sequence in self.running if not sequence.pending]
        # Once steps were made smaller, samples whose prompts came from elsewhere may fill them all.
        budget = max(0, self.tokens.value - len(decodes))
        if decodes and self._config.mixed_tokens is not None:
            sizes = mixed_sizes(self._config.mixed_tokens, self._chunk_multiple)
            queue = itertools.islice(self.waiting, len(self._slots))
            budget = min(budget, mixed_budget(sizes, itertools.chain(begun, queue)))
        prefills: list[Work] = []
        for sequence in begun:
            if self._chunk(sequence, budget):
                budget -= self._schedule_chunk(sequence, budget, prefills)
        for sequence in list(self.waiting):
            full = not self._slots or len(self.running) >= self._samples.value
            if budget < self._chunk_multiple or full:
                break
            if _waits_for_leader(sequence):
                continue
            if sequence.pending:  # preempted while its last token was on the device
                break
            if not self._admit(sequence):
                break
            if sequence.stage is not Stage.DECODE:
                budget -= self._schedule_chunk(sequence, budget, prefills)
        if not decodes and not prefills:
            return None
        return StepPlan(tuple(decodes), tuple(prefills))

    def commit(self, plan: StepPlan, results: Iterable[Sampled]) -> list[TokenOutput]:
        """Takes a step's results in; returns the news of every sample that got any."""
        outputs = []
        for work, result in zip(plan.work, results, strict=True):
            sequence = work.sequence
            if sequence.finish is not None:
                continue
            sequence.prompt_logprobs[work.start :] = result.prompt_logprobs
            if work.samples:
                assert result.token is not None
                sequence.pending -= 1
                sequence.tokens.append(result.token)
                outputs.append(self._output(sequence, result))
            self._publish(sequence)
            if work.samples and _wanted_elsewhere(sequence):
                self.running.remove(sequence)
                self.moving[sequence.request.request_id] = sequence
            elif sequence.finish is not None or (work.samples and sequence.delivered):
                self._retire(sequence)
        return outputs

    def part(self, request_id: int) -> Sequence | None:
        """The sample that is computed here in part, if it is under way."""
        return self._parts.get(request_id)

    def arrive(self, sequence: Sequence) -> None:
        """The pages of a prompt have come; its answer goes on once its next token is known."""
        sequence.computed = sequence.given
        self._go_on(sequence)

    def proceed(self, sequence: Sequence, message: Continue) -> None:
        """The next token of a prompt is known; its answer goes on once its pages have come."""
        sequence.proceeds = message
        self._go_on(sequence)

    def deliver(self, sequence: Sequence) -> None:
        """The pages of a prompt are with whom they were for; it ends once its next token is
        known."""
        sequence.delivered = True
        if len(sequence.tokens) > sequence.given:
            self._retire(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Ends a part of which nothing more is wanted here, without news."""
        if sequence.finish is None:  # so that a step under way is not heard of it
            sequence.finish = FinishReason.CANCELLED
        self._retire(sequence)

    def left(self, sequence: Sequence) -> None:
        """Others neither read nor write the pages of a part that has ended any more."""
        self._free(*self._leaving.pop(sequence))

    def retry_smaller(self, plan: StepPlan) -> bool:
        """Takes back a step that did not fit into memory, so that the next one is smaller: half its
        tokens, or without the youngest sample. False if nothing is left to give up."""
        for work in plan.work:
            work.sequence.computed -= work.length
            work.sequence.pending -= work.samples
        smaller = max(plan.tokens // 2, len(self.running) + self._chunk_multiple)
        if plan.prefills and smaller < plan.tokens:
            self.tokens.fall(plan.tokens, smaller)
            return True
        youngest = self._youngest()
        if youngest is not None and len(self.running) > 1:
            self._preempt(youngest)
            self._samples.fall(len(plan.work), len(self.running))
            return True
        return False

    def fitted(self, plan: StepPlan) -> bool:
        """Notes that a step fitted into memory, after which the next ones may be larger. True where
        they may now be as large as they ever were."""
        limits = ((self.tokens, plan.tokens), (self._samples, len(plan.work)))
        risen = [limit.fitted(used) for limit, used in limits]
        return any(risen) and all(limit.value == limit.most for limit, _ in limits)

    def abort(self, message: Abort) -> list[TokenOutput]:
        """Ends the named samples where they still exist, and says so for each."""
        named = [
            sequence
            for sequence in [*self.waiting, *self.running, *self.moving.values()]
            if sequence.request.request_id == message.request_id
            and message.index in (None, sequence.index)
        ]
        over = [sequence for sequence in named if sequence.finish is not None]
        for sequence in over:  # only its pages were still wanted, elsewhere
            self._retire(sequence)
        return [
            self._end(sequence, message.reason, None) for sequence in named if sequence not in over
        ]

    def abort_all(self) -> list[TokenOutput]:
        """Ends everything that is here."""
        sequences = [*self.waiting, *self.running, *self.moving.values()]
        requests = dict.fromkeys(sequence.request.request_id for sequence in sequences)
        return [end for request in requests for end in self.abort(Abort(request_id=request))]

    def fail(self, sequences: Iterable[Sequence], error: str) -> list[TokenOutput]:
        """Ends samples that cannot be computed, with the reason."""
        return [
            self._end(sequence, FinishReason.FAILED, error)
            for sequence in sequences
            if sequence.finish is None
        ]

    def _schedule_decodes(self) -> list[Work]:
        decodes: list[Work] = []
        for sequence in list(self.running):  # oldest first, so victims are never scheduled yet
            length = sequence.length
            preempted = sequence.slot < 0
            ending = sequence.pending and length >= sequence.longest
            # Of its prompt even a last token alone is a chunk, which is sent on as such.
            only_prompt = sequence.stage is Stage.PREFILL
            if preempted or ending or only_prompt or length - sequence.computed != 1:
                continue
            if self._make_room(sequence):
                decodes.append(self._take(sequence, 1))
        return decodes

    def _make_room(self, sequence: Sequence) -> bool:
        """A page for the next token, taken from younger samples if need be; False if this sample
        itself had to give way."""
        if sequence.pages_for(sequence.computed + 1) == 0:
            return True
        while not self.pool.available:
            victim = self._youngest()
            assert victim is not None
            self._preempt(victim)
            if victim is sequence:
                return False
        self._grow(sequence, sequence.computed + 1)
        return True

    def _schedule_chunk(self, sequence: Sequence, budget: int, prefills: list[Work]) -> int:
        length = self._chunk(sequence, budget)
        prefills.append(self._take(sequence, length))
        return length

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Tokens of the next chunk: all that are left, or as many whole multiples as there is
        budget for."""
        if sequence.remaining <= budget:
            return sequence.remaining
        return budget - budget % self._chunk_multiple

    def _take(self, sequence: Sequence, length: int) -> Work:
        start = sequence.computed
        sequence.computed += length
        samples = sequence.remaining == 0
        if samples:
            sequence.pending += 1
        return Work(sequence, start, length, samples)

    def _admit(self, sequence: Sequence) -> bool:
        """Moves a waiting sample into the running ones if pages for all its tokens are there."""
        found = self._known_pages(sequence)
        idle = sum(self.pool.owners(page) == 0 for page in found)
        needed = sequence.pages_for(sequence.length) - len(found)
        # Leave every running sample its next page, or the newcomer would soon be thrown out again.
        if needed + len(self.running) + len(self.moving) > self.pool.available - idle:
            return False
        for page in found:
            self.pool.share(page)
        sequence.pages.extend(found)
        sequence.computed = len(found) * PAGE_TOKENS
        if not sequence.prefilled_once:
            sequence.cached_tokens = sequence.computed
        self._grow(sequence, sequence.length)
        self.waiting.remove(sequence)
        sequence.slot = self._slots.pop()
        sequence.admissions += 1
        if sequence.stage is Stage.DECODE:
            self.moving[sequence.request.request_id] = sequence
            self.granted.append(sequence)
        else:
            self._run(sequence)
        return True

    def _known_pages(self, sequence: Sequence) -> list[int]:
        """Pages that a sample can begin with."""
        if sequence.root is None or sequence.wants_prompt_logprobs:
            return []
        # The last token is always computed: its hidden state gives the next one.
        return self.pool.find(sequence.keys(sequence.length - 1))

    def _run(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        self.running.sort(key=lambda other: other.arrival)

    def _go_on(self, sequence: Sequence) -> None:
        """From here on a sample is like any other, if nothing is missing."""
        if sequence.proceeds is None or not sequence.prefilled:
            return
        del self.moving[sequence.request.request_id]
        del self._parts[sequence.request.request_id]
        sequence.stage = Stage.WHOLE
        sequence.prefilled_once = True
        sequence.tokens.append(sequence.proceeds.token)
        sequence.finish = sequence.proceeds.finish
        self._run(sequence)
        self._publish(sequence)
        if sequence.finish is not None:
            self._retire(sequence)

    def _youngest(self) -> Sequence | None:
        """Who gives way next. Pages that others may be reading stay."""
        fixed = Stage.PREFILL
        return next((other for other in reversed(self.running) if other.stage is not fixed), None)

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        for _ in range(sequence.pages_for(tokens)):
            sequence.pages.append(self.pool.allocate())

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._leave(sequence)
        position = sum(other.arrival < sequence.arrival for other in self.waiting)
        self.waiting.insert(position, sequence)

    def _leave(self, sequence: Sequence) -> None:
        free = self._let_go(sequence)
        if self.moving.get(sequence.request.request_id) is sequence:
            del self.moving[sequence.request.request_id]
        else:
            self.running.remove(sequence)
        slot, sequence.slot = sequence.slot, -1
        pages = sequence.forget_pages()
        if free:
            self._free(slot, pages)
        else:
            self._leaving[sequence] = slot, pages

    def _free(self, slot: int, pages: list[int]) -> None:
        self._slots.append(slot)
        self.pool.release(pages)

    def _output(self, sequence: Sequence, result: Sampled) -> TokenOutput:
        token = sequence.tokens[-1]
        if token in sequence.stop_token_ids:
            sequence.finish = FinishReason.STOP
        elif len(sequence.tokens) >= sequence.longest:
            sequence.finish = FinishReason.LENGTH
        first, reports = not sequence.prefilled_once, sequence.wants_prompt_logprobs
        sequence.prefilled_once = True
        # Told once; of a long prompt they take more memory than all else that is kept of it.
        prompt_logprobs, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), []
        return TokenOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token=token,
            logprob=result.logprob,
            prompt_logprobs=prompt_logprobs if reports else None,
            cached_tokens=sequence.cached_tokens if first else 0,
            finish=sequence.finish,
        )

    def _publish(self, sequence: Sequence) -> None:
        if sequence.root is not None:
            for page, key in sequence.newly_sealed():
                self.pool.publish(page, key)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None) -> TokenOutput:
        sequence.finish = reason
        self._retire(sequence)
        return TokenOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            finish=reason,
            error=error,
        )

    def _retire(self, sequence: Sequence) -> None:
        if sequence.slot >= 0:
            self._leave(sequence)
        else:
            self._let_go(sequence)
            self.waiting.remove(sequence)

    def _let_go(self, sequence: Sequence) -> bool:
        """Whether nobody else has to do with its pages."""
        if sequence.stage is Stage.WHOLE:
            return True
        del self._parts[sequence.request.request_id]
        return self.before_leaving(sequence)


def _waits_for_leader(sequence: Sequence) -> bool:
    """Samples of one prompt wait until the first has computed it, then share its pages."""
    leader = sequence.leader
    return leader is not None and leader.finish is None and not leader.prefilled_once


def _wanted_elsewhere(sequence: Sequence) -> bool:
    """Whether the pages of a prompt are still to be sent: not if its only sample has ended."""
    if sequence.stage is not Stage.PREFILL or sequence.delivered:
        return False
    return sequence.finish is None or sequence.request.n > 1
