"""The engine: a thread that schedules, launches and commits steps until it is told to stop.

With overlap a step is scheduled and launched while the one before it still runs, so that a GPU
never waits for the host. Nothing that a step is made of depends on the tokens of the one before:
they stay on the device, and a stop is noticed one step late, when what was computed too much is
thrown away.

Messages come in from any thread; news goes out through callbacks: tokens as a list for each step,
what other engines must know at once.
"""

from __future__ import annotations

import enum
import functools
import gc
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec
import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.handover import Arrived, Delivered, Handover, Left, Lost, page_format
from fourfold.engine.messages import (
    Abort,
    Continue,
    EngineStats,
    Granted,
    HandoverNews,
    Moved,
    Stage,
    Submit,
    TokenOutput,
)
from fourfold.engine.page_pool import PagePool
from fourfold.engine.runner import Launched, Runner
from fourfold.engine.scheduler import Scheduler, StepPlan
from fourfold.engine.sequence import Sequence
from fourfold.engine.shortage import is_shortage
from fourfold.errors import ConfigError, FourfoldError
from fourfold.kernels import device_memory
from fourfold.transport.format import PageFormat
from fourfold.transport.node import Node
from fourfold.transport.peer import DevicePages

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 0.25
"""Without work or word before graphs are recorded ahead of need: a request that comes amid a
recording waits for its end, so those who ask again once they are answered shall not meet one."""

Emit = Callable[[list[TokenOutput]], None]
Tell = Callable[[HandoverNews], None]
_OfParts = Granted | Continue | Delivered | Arrived


class _Order(enum.Enum):
    """What concerns everything at once."""

    ABORT_ALL = 0


_Message = Submit | Abort | _Order | Lost | Left | _OfParts


class Engine:
    """Computes requests with one runner. Messages may be given to it from any thread."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        """Raises `ConfigError` where pages or steps are too small for what `config` asks."""
        self._runner = runner
        config = config.on(runner.device.type)
        context = runner.max_context
        if config.max_context is not None:
            if config.max_context > context:
                raise ConfigError(
                    f"--max-context {config.max_context} exceeds {context}, the tokens that the "
                    "model knows and the KV pages hold; lower it, or raise --kv-memory-gib"
                )
            context = config.max_context
        multiple = runner.pages.chunk_multiple
        if config.tokens - config.running < multiple:
            raise ConfigError(
                f"--step-tokens {config.tokens} must exceed --max-running "
                f"{config.running} by {multiple}, the tokens of a page, or prompts would starve"
            )
        self.scheduler = Scheduler(
            config,
            PagePool(runner.page_count),
            context,
            chunk_multiple=multiple,
        )
        self._inbox: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._handover: Handover | None = None
        self._tell: Tell = lambda news: None
        self.on_device_lost: Callable[[], None] = lambda: None
        """Called on the thread when a step failed and none will succeed; then its samples fail."""
        self.on_failure: Callable[[FourfoldError], None] = lambda error: None
        """Called on the thread when it ends by itself: nobody hears of what is under way."""
        self._thread: threading.Thread | None = None
        self._totals = EngineStats(pages_total=runner.page_count, step_tokens=config.tokens)
        self._ahead = 1 if config.overlap else 0
        self._under_way: deque[tuple[StepPlan, Launched, float]] = deque()
        self._early: list[TokenOutput] = []
        """News that came of launching a step, to be told with what is taken in."""
        self._ended = 0.0
        self._turn_began: float | None = None
        self._alone = False
        self._quiet_at = 0.0
        """From when on graphs are recorded ahead of need, if nothing comes before."""

    @property
    def max_context(self) -> int:
        return self.scheduler.max_context

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step."""
        return self._totals

    @property
    def turn_seconds(self) -> float:
        """For how long the thread has been at one step and the messages before it; 0 while it waits
        for work."""
        began = self._turn_began
        return 0.0 if began is None else time.perf_counter() - began

    @property
    def device(self) -> torch.device:
        """What it computes on."""
        return self._runner.device

    @property
    def page_format(self) -> PageFormat:
        """What its pages are to others."""
        return page_format(self._runner.pages)

    @property
    def device_pages(self) -> DevicePages | None:
        """Where they lie, if on a GPU and shared."""
        records, *opened = (memory.device_memory for memory in self._runner.pages.memory)
        if records is None:
            return None
        return DevicePages(
            gpu=str(torch.cuda.get_device_properties(self._runner.device).uuid),
            pages=self._runner.page_count,
            records=records,
            open=opened[0] if opened else None,
        )

    def connect(self, node: Node) -> None:
        """Lets it share requests with others, before it is started."""
        pages = self._runner.pages
        for memory in pages.memory:
            if memory.region is not None:
                node.register(memory.region)
        attach = functools.partial(device_memory.attach, device=pages.device)
        self._handover = Handover(node, pages, self._inbox.put, attach)
        self.scheduler.before_leaving = self._handover.let_go
        self._runner.stored = self._handover.stored

    def start(self, emit: Emit, tell: Tell = lambda news: None, *, alone: bool = False) -> None:
        """Starts the thread; on it `emit` is called with the tokens of each step, and `tell` with
        what the other engine of a request must know. Until `stop`, Python looks for garbage only
        among what the process makes from here on.

        `alone`: nobody else in the process waits for the whole GPU, which CUDA forbids while a
        graph is recorded; so graphs may be recorded while there is nothing else to do.
        """
        # To look through the model and all that was imported takes longer than many a step.
        gc.freeze()
        self._tell = tell
        self._alone = alone
        self._thread = threading.Thread(target=self._run, args=(emit,), name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lets the running step finish, then ends the thread; what still runs gets no more news."""
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()
            self._runner.settle()
            gc.unfreeze()
        if self._handover is not None:
            self._handover.close()

    def submit(self, request: Submit) -> None:
        self._inbox.put(request)

    def abort(self, message: Abort) -> None:
        self._inbox.put(message)

    def abort_all(self) -> None:
        """Ends all that was submitted so far."""
        self._inbox.put(_Order.ABORT_ALL)

    def relay(self, message: Granted | Continue) -> None:
        """Takes in what the other engine of a request said."""
        self._inbox.put(message)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute, and nothing under way."""
        return self.scheduler.idle and not self._under_way

    def step(self) -> list[TokenOutput] | None:
        """One turn of the heart: launches a step, then takes in the oldest that is under way if
        that is as many as may be. Returns its news, or None if there was nothing to do."""
        plan = self._launch()
        if plan is None and not self._under_way:
            return None
        outputs, self._early = self._early, []
        if self._under_way and (plan is None or len(self._under_way) > self._ahead):
            outputs += self._take_in(*self._under_way.popleft())
        self._observe()
        return outputs

    def _launch(self) -> StepPlan | None:
        """Schedules and enqueues the next step, if there is one."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        self._grant()
        if plan is None:
            return None
        scheduled = time.perf_counter()
        too_much = None
        try:
            launched = self._runner.launch(plan)
        except Exception as error:  # one bad step must not end the service
            if is_shortage(error):
                too_much = _reason(error)
            else:
                logger.exception("a step of %d tokens failed", plan.tokens)
                self._early += self._fail(plan, _reason(error))
        else:
            self._under_way.append((plan, launched, started))
            if self._handover is not None and launched.reached is not None:
                self._handover.launched(plan.prefills, launched.reached)
            prompt_tokens = sum(work.prompt_tokens for work in plan.work)
            self._count(steps=1, prompt_tokens=prompt_tokens)
            if self.scheduler.fitted(plan):
                logger.info("steps may be as large again as before one did not fit into memory")
        self._count(
            schedule_seconds=scheduled - started,
            launch_seconds=time.perf_counter() - scheduled,
        )
        if too_much is not None:  # here, because the error holds what the step had allocated
            self._shrink(plan, too_much)
        return plan

    def _take_in(self, plan: StepPlan, launched: Launched, started: float) -> list[TokenOutput]:
        """Waits for a step and commits it."""
        waiting = time.perf_counter()
        try:
            results = launched.results()
        except Exception as error:  # as above
            computed = time.perf_counter()
            logger.exception("a step of %d tokens failed", plan.tokens)
            outputs = self._fail(plan, _reason(error))
        else:
            computed = time.perf_counter()
            outputs = self.scheduler.commit(plan, results)
            if self._handover is not None:
                self._handover.computed(plan.prefills)
        ended = time.perf_counter()
        self._count(
            cached_tokens=sum(output.cached_tokens for output in outputs),
            generated_tokens=sum(output.token is not None for output in outputs),
            # Steps overlap: from the end of the one before, if it began earlier.
            step_seconds=ended - max(started, self._ended),
            wait_seconds=computed - waiting,
            commit_seconds=ended - computed,
        )
        self._ended = ended
        return outputs

    def _shrink(self, plan: StepPlan, reason: str) -> None:
        """A step did not fit into memory: the next one is smaller."""
        self._count(shortages=1)
        self._runner.free_memory()
        smaller = self.scheduler.retry_smaller(plan)
        # It may have drawn tokens before it failed, over those that nobody has read yet.
        while self._under_way:
            self._early += self._take_in(*self._under_way.popleft())
        if smaller:
            logger.warning("a step of %d tokens did not fit into memory; trying less", plan.tokens)
        else:
            logger.error("a step of %d tokens did not fit into memory: %s", plan.tokens, reason)
            self._early += self._fail(plan, reason)

    def _fail(self, plan: StepPlan, reason: str) -> list[TokenOutput]:
        if not self._runner.usable:
            self.on_device_lost()
        return self.scheduler.fail([work.sequence for work in plan.work], reason)

    def receive(self, wait: float = 0.0) -> list[TokenOutput] | None:
        """Takes in all messages that have come, waiting for one for so many seconds at most;
        returns the news that they make at once, or None when told to stop."""
        outputs: list[TokenOutput] = []
        if not wait:
            self._turn_began = time.perf_counter()
        while True:
            try:
                message = self._inbox.get(wait > 0, None if wait == math.inf else wait)
            except queue.Empty:
                self._observe()
                return outputs
            if wait:
                self._turn_began = time.perf_counter()
            wait = 0.0
            if message is None:
                return None
            self._quiet_at = time.perf_counter() + _QUIET_SECONDS
            outputs.extend(self._hear(message))

    def _hear(self, message: _Message) -> list[TokenOutput]:
        if isinstance(message, Submit):
            assert message.stage is Stage.WHOLE or self._handover is not None
            return self.scheduler.add(message)
        if isinstance(message, Abort):
            return self.scheduler.abort(message)
        if isinstance(message, _Order):
            return self.scheduler.abort_all()
        if isinstance(message, Lost):
            if self._handover is not None:
                self._handover.detach(message.epoch)
            return []
        if isinstance(message, Left):
            if self._handover is not None and message.spoilt is not None:
                self._handover.clear(message.spoilt)
            self.scheduler.left(message.sequence)
            return []
        part = self.scheduler.part(message.request_id)
        if part is not None:
            self._hear_of(part, message)
        return []

    def _hear_of(self, part: Sequence, message: _OfParts) -> None:
        """What concerns a part of a request that is still under way here."""
        assert self._handover is not None
        match message:
            case Granted():
                self._handover.grant(message, part)
                return
            case Continue():
                self.scheduler.proceed(part, message)
                return
            case Arrived(error=None):
                message = self._land(part)
            case Delivered(error=None):
                self.scheduler.deliver(part)
            case Delivered():
                self.scheduler.drop(part)
        self._tell(Moved(request_id=message.request_id, error=message.error))

    def _land(self, part: Sequence) -> Arrived:
        """Has a part whose pages have come go on, if they can be put where they belong."""
        assert self._handover is not None
        request_id = part.request.request_id
        try:
            with self._runner.on_stream():
                self._handover.land(request_id)
        except Exception as error:  # one prompt must not end the service
            logger.exception("pages of a prompt cannot be taken in")
            return Arrived(request_id, _reason(error))
        self.scheduler.arrive(part)
        return Arrived(request_id, None)

    def _grant(self) -> None:
        """Makes pages ready for the prompts that were granted them, and says so."""
        granted, self.scheduler.granted = self.scheduler.granted, []
        for part in granted:
            assert self._handover is not None
            news: HandoverNews
            try:
                with self._runner.on_stream():
                    news = self._handover.expect(part)
            except Exception as error:  # as in `_land`
                logger.exception("pages of a prompt cannot be received")
                news = Moved(request_id=part.request.request_id, error=_reason(error))
            self._tell(news)

    def _run(self, emit: Emit) -> None:
        try:
            self._serve(emit)
        except Exception as error:  # a mistake of ours, after which nothing is certain
            self.on_failure(FourfoldError(f"the engine has ended: {_reason(error)}"))
            raise

    def _serve(self, emit: Emit) -> None:
        worked, ahead = True, self._alone
        self._quiet_at = time.perf_counter() + _QUIET_SECONDS
        while True:
            wait = 0.0 if worked else math.inf
            if not worked and ahead and self.idle:
                wait = max(0.0, self._quiet_at - time.perf_counter())
                if not wait:
                    self._turn_began = time.perf_counter()  # it may hang as a step may
                    ahead = self._runner.prepare()
                    self._turn_began = None
            if (ended := self.receive(wait)) is None:
                break
            outputs = self.step()
            self._turn_began = None
            worked = outputs is not None
            if worked:
                self._quiet_at = time.perf_counter() + _QUIET_SECONDS
            if news := [*ended, *(outputs or ())]:
                try:
                    emit(news)
                except Exception:  # whoever listened is gone; others may not be
                    logger.exception("news of %d samples could not be delivered", len(news))
        self._turn_began = None

    def _count(self, **more: float) -> None:
        """Adds to counters."""
        totals = self._totals
        sums = {name: getattr(totals, name) + value for name, value in more.items()}
        self._totals = msgspec.structs.replace(totals, **sums)

    def _observe(self) -> None:
        scheduler = self.scheduler
        held = scheduler.held
        self._totals = msgspec.structs.replace(
            self._totals,
            running=held.running,
            waiting=held.waiting,
            moving=held.moving,
            shared=held.shared,
            pages_in_use=scheduler.pool.in_use,
            pages_cached=scheduler.pool.idle,
            preemptions=scheduler.preemptions,
            step_tokens=scheduler.tokens.value,
            graphs=self._runner.graphs,
        )


def _reason(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
