"""The engine: a thread that schedules, launches and commits steps until it is told to stop.

Messages come in from any thread; news goes out through one callback, a list for each step.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import msgspec

from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import Abort, EngineStats, Submit, TokenOutput
from fourfold.engine.page_pool import PagePool
from fourfold.engine.runner import Runner
from fourfold.engine.scheduler import Scheduler, StepPlan
from fourfold.errors import ConfigError

logger = logging.getLogger(__name__)

Emit = Callable[[list[TokenOutput]], None]


class Engine:
    """Computes requests with one runner. `submit` and `abort` may be called from any thread."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self._runner = runner
        context = runner.max_context
        if config.max_context is not None:
            context = min(context, config.max_context)
        multiple = runner.pages.chunk_multiple
        if config.step_tokens - config.max_running < multiple:
            raise ConfigError(
                f"--step-tokens {config.step_tokens} must exceed --max-running "
                f"{config.max_running} by {multiple}, the tokens of a page, or prompts would starve"
            )
        self.scheduler = Scheduler(
            config,
            PagePool(runner.page_count),
            context,
            chunk_multiple=multiple,
        )
        self._inbox: queue.SimpleQueue[Submit | Abort | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._totals = EngineStats(pages_total=runner.page_count)

    @property
    def max_context(self) -> int:
        return self.scheduler.max_context

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step."""
        return self._totals

    def start(self, emit: Emit) -> None:
        """Starts the thread; `emit` is called on it with the news of each step."""
        self._thread = threading.Thread(target=self._run, args=(emit,), name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lets the running step finish, then ends the thread; what still runs gets no more news."""
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()

    def submit(self, request: Submit) -> None:
        self._inbox.put(request)

    def abort(self, message: Abort) -> None:
        self._inbox.put(message)

    def step(self) -> list[TokenOutput] | None:
        """One turn of the heart: the news of one step, or None if there was nothing to compute."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        scheduled = time.perf_counter()
        try:
            results = self._runner.launch(plan).results()
            outputs = self.scheduler.commit(plan, results)
        except Exception as error:  # one bad step must not end the service
            logger.exception("a step of %d tokens failed", plan.tokens)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            outputs = self.scheduler.fail([work.sequence for work in plan.work], reason)
        self._count(plan, outputs, scheduled - started, time.perf_counter() - started)
        return outputs

    def receive(self, *, wait: bool) -> list[TokenOutput] | None:
        """Takes in all messages that have come, waiting for one if asked; returns the news that
        they make at once, or None when told to stop."""
        outputs: list[TokenOutput] = []
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                self._observe()
                return outputs
            wait = False
            if message is None:
                return None
            if isinstance(message, Submit):
                outputs.extend(self.scheduler.add(message))
            else:
                outputs.extend(self.scheduler.abort(message))

    def _run(self, emit: Emit) -> None:
        worked = True
        while (ended := self.receive(wait=not worked)) is not None:
            outputs = self.step()
            worked = outputs is not None
            if news := [*ended, *(outputs or ())]:
                try:
                    emit(news)
                except Exception:  # whoever listened is gone; others may not be
                    logger.exception("news of %d samples could not be delivered", len(news))

    def _count(
        self, plan: StepPlan, outputs: list[TokenOutput], schedule: float, step: float
    ) -> None:
        totals = self._totals
        self._totals = msgspec.structs.replace(
            totals,
            prompt_tokens=totals.prompt_tokens + sum(work.prompt_tokens for work in plan.work),
            cached_tokens=totals.cached_tokens + sum(output.cached_tokens for output in outputs),
            generated_tokens=totals.generated_tokens
            + sum(output.token is not None for output in outputs),
            steps=totals.steps + 1,
            step_seconds=totals.step_seconds + step,
            schedule_seconds=totals.schedule_seconds + schedule,
        )
        self._observe()

    def _observe(self) -> None:
        scheduler = self.scheduler
        self._totals = msgspec.structs.replace(
            self._totals,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_in_use=scheduler.pool.in_use,
            pages_cached=scheduler.pool.idle,
            preemptions=scheduler.preemptions,
        )
