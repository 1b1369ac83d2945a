"""/metrics: how requests ended, how long they took, what the engine counts."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client import Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from fourfold.api import metrics, protocol
from fourfold.errors import OverloadedError, RequestFailedError
from fourfold.gateway.fleet.fleet import Fleet
from tests.cpu.api.conftest import Server, eventually
from tests.cpu.api.fakes import FakeGateway
from tests.cpu.api.test_bad_input import CHAT, chat, connected, head
from tests.cpu.gateway.test_fleet import eventually as soon
from tests.cpu.gateway.test_fleet import running

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(http: httpx.Client) -> Samples:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def growth(before: Samples, after: Samples, name: str, **labels: str) -> float:
    key = (name, frozenset(labels.items()))
    return after[key] - before.get(key, 0.0)


def outcomes(before: Samples, after: Samples) -> dict[str, float]:
    names = ("finished", "failed", "cancelled", "refused")
    return {
        outcome: grown
        for outcome in names
        if (grown := growth(before, after, "fourfold_requests_total", route=CHAT, outcome=outcome))
    }


def test_each_outcome_is_counted_once(
    http: httpx.Client, server: Server, gateway: FakeGateway
) -> None:
    before = scrape(http)
    for stream in (False, True):
        assert http.post(CHAT, json=chat(stream=stream)).status_code == 200
    gateway.say("a", "b", delay=0.01, fail=RequestFailedError("broken"), fail_after=1)
    http.post(CHAT, json=chat(stream=True))
    http.post(CHAT, json=chat(stream=False))
    gateway.say("a", fail=ZeroDivisionError())
    http.post(CHAT, json=chat())
    gateway.say(refuse=OverloadedError("full", retry_after=1))
    http.post(CHAT, json=chat())
    http.post(CHAT, json=chat(n=0))
    http.post(CHAT, content=b" " * 5_000_000)
    http.get(CHAT)
    gateway.say("slow", delay=30)
    content = json.dumps(chat()).encode()
    with connected(server) as connection:
        connection.sendall(head(len(content)) + content)
        assert eventually(lambda: gateway.active == 1)
    assert server.quiet()
    expected = {"finished": 2, "failed": 3, "cancelled": 1, "refused": 4}
    assert eventually(lambda: outcomes(before, scrape(http)) == expected)


def test_times_and_tokens(http: httpx.Client, gateway: FakeGateway) -> None:
    before = scrape(http)
    gateway.say("a", "b", "c", delay=0.05, cached_tokens=1)
    began = time.perf_counter()
    http.post(CHAT, json=chat(n=2, max_tokens=3))
    took = time.perf_counter() - began
    after = scrape(http)
    first = growth(before, after, "fourfold_time_to_first_token_seconds_sum", route=CHAT)
    each = growth(before, after, "fourfold_time_per_output_token_seconds_sum", route=CHAT)
    whole = growth(before, after, "fourfold_request_duration_seconds_sum", route=CHAT)
    assert first >= 0.04
    assert each >= 0.04
    assert first + 2 * each <= whole <= took
    assert growth(before, after, "fourfold_time_per_output_token_seconds_count", route=CHAT) == 1
    assert growth(before, after, "fourfold_prompt_tokens_total") == 1
    assert growth(before, after, "fourfold_cached_prompt_tokens_total") == 1
    assert growth(before, after, "fourfold_output_tokens_total") == 6


def test_the_engines_numbers(http: httpx.Client, gateway: FakeGateway) -> None:
    now, engine = scrape(http), gateway.snapshot().engine
    assert now["fourfold_active_requests", frozenset()] == 0
    for name, number in {
        "engine_running_samples": engine.running,
        "engine_waiting_samples": engine.waiting,
        "engine_moving_samples": engine.moving,
        "kv_cache_pages": engine.pages_total,
        "kv_cache_pages_in_use": engine.pages_in_use,
        "kv_cache_pages_cached": engine.pages_cached,
        "engine_prompt_tokens_total": engine.prompt_tokens,
        "engine_cached_tokens_total": engine.cached_tokens,
        "engine_generated_tokens_total": engine.generated_tokens,
        "engine_preemptions_total": engine.preemptions,
        "engine_steps_total": engine.steps,
        "engine_shortages_total": engine.shortages,
        "engine_graphs": engine.graphs,
        "gateway_news_total": gateway.snapshot().gateway.news,
    }.items():
        assert now[f"fourfold_{name}", frozenset()] == number, name


def test_no_counter_falls_when_a_worker_dies() -> None:
    numbers = FakeGateway().snapshot()

    async def main() -> None:
        async with running() as run:
            for worker in (await run.worker("a"), await run.worker("b")):
                worker.stats = numbers.engine
                worker.tell()
            await soon(lambda: run.fleet.stats.graphs == 2 * numbers.engine.graphs)
            before = counted(run.fleet)
            assert len(before) > 10
            worker.socket.close()
            await soon(lambda: len(run.fleet.members) == 1)
            assert counted(run.fleet) == before

    def counted(fleet: Fleet) -> dict[str, float]:
        gateway: Any = FakeGateway()
        gateway.snapshot = lambda: msgspec.structs.replace(numbers, engine=fleet.stats)
        return {
            sample.name: sample.value
            for family in metrics.GatewayCollector(gateway).collect()
            for sample in family.samples
            if family.type == "counter"
        }

    asyncio.run(main())


@pytest.mark.parametrize("part", ["engine", "gateway"])
def test_all_seconds_are_shown(part: str, http: httpx.Client, gateway: FakeGateway) -> None:
    now, numbers = scrape(http), msgspec.structs.asdict(getattr(gateway.snapshot(), part))
    seconds = {field: value for field, value in numbers.items() if field.endswith("_seconds")}
    assert len(seconds) > 3
    for field, value in seconds.items():
        assert now.get((f"fourfold_{part}_{field}_total", frozenset())) == value, field


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_of_http(stream: bool, http: httpx.Client) -> None:
    before = scrape(http)
    http.post(CHAT, json=chat(stream=stream))
    served = scrape(http)
    http.post(CHAT, json=chat(stream=stream, n=0))
    refused = scrape(http)
    for name in ("read", "write"):
        assert growth(before, served, f"fourfold_http_{name}_seconds_total", route=CHAT) > 0
    assert growth(served, refused, "fourfold_http_read_seconds_total", route=CHAT) > 0
    assert growth(served, refused, "fourfold_http_write_seconds_total", route=CHAT) == 0


def test_parsing_is_part_of_reading(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 1000
            return self.now

    before = scrape(http)
    monkeypatch.setattr(protocol, "time", Clock())
    http.post(CHAT, json=chat())
    name = "fourfold_http_read_seconds_total"
    assert eventually(lambda: growth(before, scrape(http), name, route=CHAT) >= 1000)


def test_waiting_is_not_counted_as_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)

    async def work(waits: asyncio.Event) -> str:
        clock.now += 1
        try:
            await waits.wait()
        finally:
            clock.now += 2
        return "done"

    async def seconds_of(leave: bool) -> float:
        counter, waits = Counter("work_seconds", "Seconds.", registry=None), asyncio.Event()

        async def count() -> str:
            return await metrics.counted(work(waits), counter)

        counting = asyncio.create_task(count())
        await asyncio.sleep(0)
        clock.now += 100
        if leave:
            counting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await counting
        else:
            waits.set()
            assert await counting == "done"
        (family,) = counter.collect()
        return family.samples[0].value

    assert asyncio.run(seconds_of(leave=False)) == 3
    assert asyncio.run(seconds_of(leave=True)) == 3


def test_names_and_help_follow_prometheus(http: httpx.Client) -> None:
    response = http.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    for family in open_metrics(response.text):  # type: ignore[no-untyped-call]
        assert family.name.startswith(("fourfold_", "process_"))
        assert family.documentation.endswith("."), family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
            assert family.documentation.startswith("Seconds ")
