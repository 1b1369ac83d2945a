"""/metrics: how requests ended, how long they took, what the engine counts."""

from __future__ import annotations

import json

import httpx
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from fourfold.errors import OverloadedError, RequestFailedError
from tests.cpu.api.conftest import Server, eventually
from tests.cpu.api.fakes import FakeGateway
from tests.cpu.api.test_bad_input import CHAT, chat, connected, head

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
    http.post(CHAT, json=chat(n=2, max_tokens=3))
    after = scrape(http)
    first = growth(before, after, "fourfold_time_to_first_token_seconds_sum", route=CHAT)
    each = growth(before, after, "fourfold_time_per_output_token_seconds_sum", route=CHAT)
    whole = growth(before, after, "fourfold_request_duration_seconds_sum", route=CHAT)
    assert 0.04 <= first < 0.1
    assert 0.04 <= each < 0.1
    assert 0.12 <= whole < 0.3
    assert growth(before, after, "fourfold_time_per_output_token_seconds_count", route=CHAT) == 1
    assert growth(before, after, "fourfold_prompt_tokens_total") == 1
    assert growth(before, after, "fourfold_cached_prompt_tokens_total") == 1
    assert growth(before, after, "fourfold_output_tokens_total") == 6


def test_the_engines_numbers(http: httpx.Client) -> None:
    now = scrape(http)
    assert now["fourfold_active_requests", frozenset()] == 0
    assert now["fourfold_engine_running_samples", frozenset()] == 2
    assert now["fourfold_engine_waiting_samples", frozenset()] == 0
    assert now["fourfold_engine_moving_samples", frozenset()] == 5
    assert now["fourfold_engine_shortages_total", frozenset()] == 1
    assert now["fourfold_kv_cache_pages", frozenset()] == 64
    assert now["fourfold_kv_cache_pages_in_use", frozenset()] == 3
    assert now["fourfold_engine_steps_total", frozenset()] == 7
    assert now["fourfold_engine_step_seconds_total", frozenset()] == 0.5


def test_names_and_help_follow_prometheus(http: httpx.Client) -> None:
    response = http.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    for family in open_metrics(response.text):  # type: ignore[no-untyped-call]
        assert family.name.startswith(("fourfold_", "process_"))
        assert family.documentation.endswith("."), family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
            assert family.documentation.startswith("Seconds ")
