"""Our own engine as a contestant: run by its thread, as when serving, and timed by what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from fourfold import __version__
from fourfold.bench.offline.cases import Case, Kind
from fourfold.bench.offline.floors import with_floor
from fourfold.bench.offline.measure import Answered, Prompts
from fourfold.bench.offline.task import Task
from fourfold.bench.offline.trace import Activity, record, settled
from fourfold.bench.record import Result
from fourfold.bench.serve.measure import spread
from fourfold.engine.building import EngineSetup, build_engine
from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import Abort, EngineStats, SamplingParams, Submit, TokenOutput
from fourfold.errors import ConfigError
from fourfold.models.checkpoint.source import find_source
from fourfold.models.loading import (
    open_checkpoint,
    packed_format,
    page_shape,
    read_model_config,
    resolve_device,
    served_precision,
)
from fourfold.models.storage import storage_of
from fourfold.quadrants.costs import costs_of
from fourfold.quadrants.kv_pages import PAGE_TOKENS

_MOST_RUNNING = 512
_MOST_STEP_TOKENS = 16384
_TRACED_STEPS = 24
_SETTLING_LAUNCHES = 6  # two steps: each is a copy, a graph and a copy
_TRACED_ANSWER = 4096
"""Tokens that a traced sequence may have at most; it is stopped when the trace is long enough."""
_STEADY_TOKENS = 4

News = tuple[float, list[TokenOutput], EngineStats]
"""When a step's news came, the news, and the counters then."""


class Ours:
    """The engine over one model, loaded when made; `stages` are the seconds that its parts took."""

    batches = True

    def __init__(self, task: Task) -> None:
        imported = time.time()
        self._device = resolve_device("auto")
        setup = EngineSetup(
            source=find_source(task.model),
            device=str(self._device),
            precision=task.precision,
            dummy=task.dummy,
            uniform_routing=task.uniform_routing,
            config=engine_config(task),
        )
        checkpoint = open_checkpoint(setup.source)
        _, self._config = read_model_config(checkpoint.fields(), checkpoint.where)
        precision = served_precision(task.precision, self._device, checkpoint)
        self._storage = storage_of(precision, self._device, packed_format(checkpoint))
        self._pages = page_shape(self._config, precision, self._device, task.kv_pages)
        self._engine, _ = build_engine(setup, lambda done, total: None)
        check_room(task.cases, self._engine.max_context)
        self._run = Run(0, self._engine.stats)
        self._engine.start(self._hear)
        self.version = f"fourfold {__version__}"
        self.stages = {"imports": imported - task.started, "engine": time.time() - imported}

    def answer(self, prompts: Prompts, tokens: int) -> Answered:
        """As `Contestant.answer`; ConfigError where the engine fails a request or ends it early."""
        run = self._begin(prompts, tokens)
        run.ended.wait()
        return run.answered(tokens)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a device beside the host."""
        return self._device.type == "cuda"

    def complete(self, case: Case, results: Sequence[Result]) -> list[Result]:
        """As `Contestant.complete`: beside the least time that they could take, and, of a decode
        case while all sequences were decoding, the spread of the steps' times and the mean of what
        the host did in a step. Of any case, the graphs recorded on the way."""
        if self.on_gpu:
            limits = costs_of(self._device).limits
            results = [
                with_floor(result, case, self._config, self._storage, self._pages, limits)
                for result in results
            ]
        figures: dict[str, tuple[float, str]] = {}
        steady = self._run.steady()
        if case.kind is Kind.DECODE and len(steady) > 1:
            percentiles = spread([b[0] - a[0] for a, b in pairwise(steady)]).percentiles
            figures |= {f"step p{p}": (percentiles[p], "s") for p in (50, 99)}
            figures |= {
                f"{name} per step": (seconds, "s")
                for name, seconds in host_seconds(steady[0][2], steady[-1][2]).items()
            }
        if graphs := self._run.news[-1][2].graphs - self._run.before.graphs:
            figures["graphs recorded meanwhile"] = (graphs, "graphs")
        return [
            *results,
            *(
                Result(case=case.title, metric=metric, value=value, unit=unit)
                for metric, (value, unit) in figures.items()
            ),
        ]

    def trace(self, case: Case, prompts: Prompts) -> list[Activity]:
        """What a GPU did in some steps of a decode case, all sequences decoding, or in the whole of
        another."""
        if case.kind is not Kind.DECODE:
            return record(lambda: self.answer(prompts, case.output_tokens))
        longest = self._engine.max_context - case.prompt_tokens
        run = self._begin(prompts, min(_TRACED_ANSWER, longest))
        while run.tokens() < _STEADY_TOKENS and not run.ended.is_set():
            time.sleep(0.005)
        activities = record(lambda: run.wait_for_steps(len(run.news) + _TRACED_STEPS))
        for number in range(len(prompts)):
            self._engine.abort(Abort(request_id=number))
        run.ended.wait()
        return settled(activities, _SETTLING_LAUNCHES)

    def close(self) -> None:
        """Ends the engine's thread."""
        self._engine.stop()

    def _begin(self, prompts: Prompts, tokens: int) -> Run:
        sampling = SamplingParams(max_tokens=tokens)
        requests = [
            Submit(request_id=number, prompt_ids=tuple(prompt), sampling=sampling)
            for number, prompt in enumerate(prompts)
        ]
        self._run = Run(len(requests), self._engine.stats)
        for request in requests:
            self._engine.submit(request)
        return self._run

    def _hear(self, outputs: list[TokenOutput]) -> None:
        self._run.hear(outputs, self._engine.stats)


class Run:
    """What the engine said of some requests, as it came. Heard on the engine's thread, which must
    not be kept: it is looked through when all have ended."""

    def __init__(self, requests: int, before: EngineStats) -> None:
        self.news: list[News] = []
        self.ended = threading.Event()
        self.before = before
        self._began = time.perf_counter()
        self._requests = self._left = requests

    def hear(self, outputs: list[TokenOutput], stats: EngineStats) -> None:
        self.news.append((time.perf_counter(), outputs, stats))
        self._left -= sum(output.finish is not None for output in outputs)
        if self._left <= 0:
            self.ended.set()

    def tokens(self) -> int:
        """The fewest tokens that any request has by now."""
        counts = dict.fromkeys(range(self._requests), 0)
        for _, outputs, _ in list(self.news):
            for output in outputs:
                counts[output.request_id] += 1
        return min(counts.values())

    def wait_for_steps(self, news: int) -> None:
        """Until so many steps have been heard of."""
        while len(self.news) < news and not self.ended.is_set():
            time.sleep(0.005)

    def answered(self, tokens: int) -> Answered:
        """When the requests were answered. ConfigError where one failed, or has not as many tokens
        as were asked for: rates are made of those."""
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        counts = dict.fromkeys(range(self._requests), 0)
        for at, outputs, _ in self.news:
            for output in outputs:
                if output.error is not None:
                    raise ConfigError(f"the engine failed a request: {output.error}")
                number = output.request_id
                first.setdefault(number, at)
                last[number] = at
                counts[number] += output.token is not None
        if (fewest := min(counts.values())) != tokens:
            raise ConfigError(f"the engine ended a request after {fewest} of {tokens} tokens")
        return Answered(
            first=max(first.values()) - self._began,
            whole=max(last.values()) - self._began,
            ttft=tuple(at - self._began for at in first.values()),
            tpot=tuple((last[n] - first[n]) / (c - 1) for n, c in counts.items() if c > 1),
        )

    def steady(self) -> Sequence[News]:
        """The news while all requests were decoding."""
        waiting = set(range(self._requests))
        started, ended = len(self.news), len(self.news)
        for number, (_, outputs, _) in enumerate(self.news):
            if waiting:
                waiting -= {output.request_id for output in outputs}
                started = number
            elif any(output.finish is not None for output in outputs):
                ended = number
                break
        return self.news[started:ended]


def check_room(cases: Sequence[Case], max_context: int) -> None:
    """ConfigError where a case's answers would be cut off, and look faster than they are."""
    for case in cases:
        needed = case.prompt_tokens + case.output_tokens
        if needed > max_context:
            raise ConfigError(
                f"{case.title} takes {needed} tokens a request and the engine holds {max_context}; "
                "shorten it in --cases, or raise --kv-memory-gib if the model goes on longer"
            )


def engine_config(task: Task) -> EngineConfig:
    """Budgets that let a task's requests run together, as far as they are not given."""
    running = task.max_running or max(
        case.requests if case.kind is Kind.DECODE else min(_MOST_RUNNING, case.requests)
        for case in task.cases
    )
    prompts = max(case.requests * case.prompt_tokens for case in task.cases)
    step = max(task.step_tokens or min(_MOST_STEP_TOKENS, prompts), running + PAGE_TOKENS)
    return EngineConfig(
        prefix_cache=False,
        kv_pages=task.kv_pages,
        max_running=running,
        step_tokens=step,
        mixed_tokens=task.mixed_tokens or step,
        kv_memory_gib=task.kv_memory_gib,
    )


def host_seconds(before: EngineStats, after: EngineStats) -> dict[str, float]:
    """Mean seconds a step of each thing that the host does, between two moments."""
    steps = after.steps - before.steps
    names = [field.name for field in msgspec.structs.fields(EngineStats)]
    return {
        name.removesuffix("_seconds"): (getattr(after, name) - getattr(before, name)) / steps
        for name in names
        if name.endswith("_seconds") and name != "step_seconds"
    }
