"""What Prometheus sees: each request's times and outcome, what HTTP's own work took, and the
counters of the engine and of the gateway.

The registry belongs to the app, so that two apps in one process do not mix. A request's outcome is
counted by the outermost layer, which starts from "refused": whatever turns a request away before a
generation is admitted, be it a missing key or a full queue, need not know about metrics.
"""

from __future__ import annotations

import enum
import time
import types
from collections.abc import Awaitable, Generator, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from fourfold import __version__
from fourfold.gateway.generation import Delta, Usage

if TYPE_CHECKING:
    from fourfold.gateway.gateway import Gateway

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_PER_TOKEN_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_REQUEST_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)

_COUNTED_ROUTES = ("/v1/chat/completions", "/v1/completions")
_STATE = "fourfold_request"

PARSE_SECONDS = "fourfold_parse_seconds"
"""Where a request's `scope["state"]` holds the seconds that parsing its bytes took."""

Result = TypeVar("Result")


class Outcome(enum.StrEnum):
    """How a request ended. Every request ends in exactly one of these."""

    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"


class RequestMetrics:
    """The instruments of one app, and the registry they are in."""

    def __init__(self, gateway: Gateway) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fourfold_requests",
            "Requests by how they ended.",
            ("route", "outcome"),
            registry=self.registry,
        )
        for route in _COUNTED_ROUTES:
            for outcome in Outcome:
                self.requests.labels(route, outcome.value)
        self.first_token = Histogram(
            "fourfold_time_to_first_token_seconds",
            "Seconds from the arrival of a request to its first token.",
            ("route",),
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "fourfold_time_per_output_token_seconds",
            "Seconds between tokens of a sample after its first, mean over a request's samples.",
            ("route",),
            buckets=_PER_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "fourfold_request_duration_seconds",
            "Seconds from the arrival of a request to its last token, of finished requests.",
            ("route",),
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "fourfold_prompt_tokens", "Prompt tokens of admitted requests.", registry=self.registry
        )
        self.cached_tokens = Counter(
            "fourfold_cached_prompt_tokens",
            "Prompt tokens of admitted requests that came from the prefix cache.",
            registry=self.registry,
        )
        self.output_tokens = Counter(
            "fourfold_output_tokens", "Tokens generated, over all samples.", registry=self.registry
        )
        self.http_read = Counter(
            "fourfold_http_read_seconds",
            "Seconds of work to parse and check requests until the gateway was called, or to "
            "refuse them, over all requests. Waiting for a client is not counted.",
            ("route",),
            registry=self.registry,
        )
        self.http_write = Counter(
            "fourfold_http_write_seconds",
            "Seconds of work to put answers into JSON or events and to send them, over all "
            "requests. Waiting for a client is not counted.",
            ("route",),
            registry=self.registry,
        )
        for route in _COUNTED_ROUTES:
            self.http_read.labels(route)
            self.http_write.labels(route)
        Info("fourfold_build", "The version that serves.", registry=self.registry).info(
            {"version": __version__}
        )
        self.registry.register(GatewayCollector(gateway))
        ProcessCollector(registry=self.registry)


class RequestRecord:
    """One request on its way: when it came, when its tokens came, how it ended."""

    def __init__(self, metrics: RequestMetrics, route: str) -> None:
        self._metrics = metrics
        self._route = route
        self._http_write = metrics.http_write.labels(route)
        self._arrival = time.perf_counter()
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self.outcome = Outcome.REFUSED

    def tokens_came(self, deltas: Iterable[Delta]) -> None:
        """Notes the time for every choice that has news."""
        now = time.perf_counter()
        if not self._first:
            self._metrics.first_token.labels(self._route).observe(now - self._arrival)
        for delta in deltas:
            self._first.setdefault(delta.index, now)
            self._last[delta.index] = now

    def ended(self, usage: Usage, outcome: Outcome) -> None:
        """Notes how an admitted request ended and what it cost."""
        self.outcome = outcome
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.cached_tokens.inc(usage.cached_tokens)
        self._metrics.output_tokens.inc(usage.completion_tokens)
        if outcome is not Outcome.FINISHED:
            return
        now = time.perf_counter()
        self._metrics.duration.labels(self._route).observe(now - self._arrival)
        gaps = usage.completion_tokens - len(self._first)
        if gaps > 0:
            waited = sum(self._last[choice] - self._first[choice] for choice in self._first)
            self._metrics.per_token.labels(self._route).observe(waited / gaps)

    def writing(self, work: Awaitable[Result]) -> Awaitable[Result]:
        """`work`, which writes a part of the answer, with its time counted."""
        return counted(work, self._http_write)

    def count(self) -> None:
        """Counts the request under its outcome; once, at its very end."""
        self._metrics.requests.labels(self._route, self.outcome.value).inc()


class CountOutcomes:
    """Outermost layer: gives every request to a generating route its record, and counts it, with
    the time that the layers inside take until they wait for tokens."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Calls the app."""
        if scope["type"] != "http" or scope["path"] not in _COUNTED_ROUTES:
            await self._app(scope, receive, send)
            return
        record = RequestRecord(self._metrics, scope["path"])
        state = scope.setdefault("state", {})
        state[_STATE] = record
        read = self._metrics.http_read.labels(scope["path"])
        try:
            await counted(self._app(scope, receive, send), read)
        except Exception:
            record.outcome = Outcome.FAILED
            raise
        finally:
            read.inc(state.get(PARSE_SECONDS, 0.0))
            record.count()


@types.coroutine
def counted(work: Awaitable[Result], seconds: Counter) -> Generator[Any, Any, Result]:
    """Awaits `work` and adds to `seconds` the time in which it ran, not that in which it waited.

    Tasks that it starts are not part of it.
    """
    running = work.__await__()
    step = partial(running.send, None)
    while True:
        began = time.perf_counter()
        try:
            waits_for = step()
        except StopIteration as end:
            result: Result = end.value
            return result
        finally:
            seconds.inc(time.perf_counter() - began)
        try:
            step = partial(running.send, (yield waits_for))
        except BaseException as error:  # a cancellation, say, which is for `work` to deal with
            step = partial(running.throw, error)


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that `scope` belongs to."""
    record = scope["state"][_STATE]
    assert isinstance(record, RequestRecord)
    return record


class _Number(NamedTuple):
    """A field of a struct of the snapshot as a metric."""

    family: type[CounterMetricFamily] | type[GaugeMetricFamily]
    name: str
    help: str
    field: str


# The engine's numbers are sums over all workers.
_ENGINE_METRICS = (
    _Number(GaugeMetricFamily, "engine_running_samples", "Samples in the batch.", "running"),
    _Number(GaugeMetricFamily, "engine_waiting_samples", "Samples that wait for room.", "waiting"),
    _Number(
        GaugeMetricFamily,
        "engine_moving_samples",
        "Samples that wait for their prompt's pages from another worker.",
        "moving",
    ),
    _Number(GaugeMetricFamily, "kv_cache_pages", "Pages there are.", "pages_total"),
    _Number(GaugeMetricFamily, "kv_cache_pages_in_use", "Pages held by requests.", "pages_in_use"),
    _Number(
        GaugeMetricFamily,
        "kv_cache_pages_cached",
        "Pages held only by the prefix cache.",
        "pages_cached",
    ),
    _Number(
        CounterMetricFamily, "engine_prompt_tokens", "Prompt tokens computed.", "prompt_tokens"
    ),
    _Number(
        CounterMetricFamily,
        "engine_cached_tokens",
        "Prompt tokens found in the prefix cache.",
        "cached_tokens",
    ),
    _Number(
        CounterMetricFamily, "engine_generated_tokens", "Tokens generated.", "generated_tokens"
    ),
    _Number(
        CounterMetricFamily,
        "engine_preemptions",
        "Samples that gave up their pages to be computed again.",
        "preemptions",
    ),
    _Number(CounterMetricFamily, "engine_steps", "Steps of the engine.", "steps"),
    _Number(
        CounterMetricFamily,
        "engine_shortages",
        "Steps that did not fit into memory and were tried smaller.",
        "shortages",
    ),
    _Number(
        GaugeMetricFamily,
        "engine_graphs",
        "CUDA graphs recorded by the workers there are now.",
        "graphs",
    ),
    _Number(
        CounterMetricFamily,
        "engine_step_seconds",
        "Seconds from the start of each step to its end, over all steps of all workers; where two "
        "overlap, from the end of the first.",
        "step_seconds",
    ),
    _Number(
        CounterMetricFamily,
        "engine_schedule_seconds",
        "Seconds of the host to choose what to compute, over all steps of all workers.",
        "schedule_seconds",
    ),
    _Number(
        CounterMetricFamily,
        "engine_launch_seconds",
        "Seconds of the host to describe, plan and enqueue, over all steps of all workers; on a "
        "CPU, to compute too.",
        "launch_seconds",
    ),
    _Number(
        CounterMetricFamily,
        "engine_wait_seconds",
        "Seconds that the host waited for the device, over all steps of all workers.",
        "wait_seconds",
    ),
    _Number(
        CounterMetricFamily,
        "engine_commit_seconds",
        "Seconds of the host to take tokens in, over all steps of all workers.",
        "commit_seconds",
    ),
)
_GATEWAY_METRICS = (
    _Number(
        CounterMetricFamily,
        "gateway_tokenize_seconds",
        "Seconds to render and tokenise prompts, over all requests.",
        "tokenize_seconds",
    ),
    _Number(
        CounterMetricFamily,
        "gateway_admit_seconds",
        "Seconds to check budgets, choose workers and tell them, over all admitted requests.",
        "admit_seconds",
    ),
    _Number(
        CounterMetricFamily,
        "gateway_detokenize_seconds",
        "Seconds to turn tokens to text and find stop strings, over all messages with tokens.",
        "detokenize_seconds",
    ),
    _Number(
        CounterMetricFamily, "gateway_news", "Messages of workers that brought tokens.", "news"
    ),
    _Number(
        CounterMetricFamily,
        "gateway_news_delay_seconds",
        "Seconds from when a worker had tokens until the gateway took them in, over all messages "
        "with tokens; of a worker that joined, from when the message was read.",
        "news_delay_seconds",
    ),
)


class GatewayCollector(Collector):
    """Reads the gateway's snapshot when scraped; nothing is counted twice."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        """One metric for each number of the snapshot; the requests' first."""
        snapshot = self._gateway.snapshot()
        yield GaugeMetricFamily(
            "fourfold_active_requests", "Requests held now.", snapshot.active_requests
        )
        for metrics, numbers in (
            (_ENGINE_METRICS, snapshot.engine),
            (_GATEWAY_METRICS, snapshot.gateway),
        ):
            for family, name, text, field in metrics:
                yield family(f"fourfold_{name}", text, getattr(numbers, field))
