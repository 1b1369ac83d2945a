"""What operators see of the workers over HTTP, and what they may change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fourfold.api.app import create_app
from fourfold.api.config import ApiConfig
from fourfold.engine.channel import News
from fourfold.engine.messages import EngineStats, Role
from fourfold.transport.stats import SHARED_MEMORY, PathStats
from tests.cpu.api.fakes import FakeGateway
from tests.cpu.gateway.test_fleet import Running, eventually, running

PATH = PathStats(
    peer="d",
    sends=True,
    path="tcp x2",
    connected=True,
    bytes=4000,
    seconds=2.0,
    frames=9,
    links=1,
    tested=1e9,
    tested_path=SHARED_MEMORY,
    round_trip=0.001,
    duplicate=0,
    stale=3,
    corrupt=1,
    failed=0,
)


def go(main: Callable[[Running, httpx.AsyncClient], Coroutine[Any, Any, None]], *keys: str) -> None:
    async def serve() -> None:
        async with running() as run:
            app = create_app(FakeGateway(), ApiConfig(api_key=keys), run.fleet)  # type: ignore[arg-type]
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                await main(run, http)

    asyncio.run(serve())


def test_workers_are_listed_and_get_other_roles() -> None:
    async def main(run: Running, http: httpx.AsyncClient) -> None:
        await run.worker("p", Role.PREFILL)
        await run.worker("rack 1/d", Role.DECODE)
        run.ask(1)
        listed = (await http.get("/cluster/workers")).json()["data"]
        assert [(w["name"], w["role"], w["state"]) for w in listed] == [
            ("p", "prefill", "ready"),
            ("rack 1/d", "decode", "ready"),
        ]
        assert (listed[0]["pid"], listed[0]["device"], listed[0]["peer"]) == (
            77,
            "cpu",
            "127.0.0.1:9",
        )
        assert (listed[0]["queued_tokens"], listed[1]["samples"]) == (500, 1)
        assert listed[1]["stats"]["pages_total"] == 1000
        changed = await http.post("/cluster/workers/rack%201/d", json={"role": "both"})
        assert changed.status_code == 200
        assert changed.json()["role"] == "both"
        assert [worker.role for worker in run.fleet.workers] == [Role.PREFILL, Role.BOTH]

    go(main)


@pytest.mark.parametrize(
    ("name", "body", "status", "said"),
    [
        ("nobody", b'{"role": "both"}', 404, "there is no worker 'nobody'; the workers are a"),
        ("a", b'{"role": "cook"}', 400, "one of both, prefill, decode"),
        ("a", b'{"role": "both", "more": 1}', 400, "one of both"),
        ("a", b"\xff", 400, "one of both"),
    ],
)
def test_what_cannot_be_changed_is_said(name: str, body: bytes, status: int, said: str) -> None:
    async def main(run: Running, http: httpx.AsyncClient) -> None:
        await run.worker("a", Role.DECODE)
        answer = await http.post(f"/cluster/workers/{name}", content=body)
        assert answer.status_code == status
        assert said in answer.json()["error"]["message"]
        assert [worker.role for worker in run.fleet.workers] == [Role.DECODE]

    go(main)


def test_nobody_without_a_key_sees_or_changes_workers() -> None:
    async def main(run: Running, http: httpx.AsyncClient) -> None:
        await run.worker("a", Role.DECODE)
        assert (await http.get("/cluster/workers")).status_code == 401
        answer = await http.post("/cluster/workers/a", json={"role": "both"})
        assert answer.status_code == 401
        assert [worker.role for worker in run.fleet.workers] == [Role.DECODE]
        headers = {"authorization": "Bearer secret"}
        assert (await http.get("/cluster/workers", headers=headers)).status_code == 200

    go(main, "secret")


def test_metrics_of_workers_and_of_the_paths_between_them() -> None:
    async def main(run: Running, http: httpx.AsyncClient) -> None:
        worker = await run.worker("p", Role.PREFILL)
        stats = EngineStats(
            running=3, moving=4, step_tokens=300, pages_total=1000, pages_in_use=5, steps=8
        )
        copied = msgspec.structs.replace(PATH, peer="e", path=SHARED_MEMORY)
        worker.say(News([], stats, 0.0, [], [PATH, copied]))
        run.ask(1)
        await eventually(lambda: len(run.fleet.workers[0].paths) == 2)
        text = (await http.get("/metrics")).text
        seen = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(("fourfold_worker", "fourfold_fleet", "fourfold_transport"))
        }
        assert seen["fourfold_worker_running", "p", "prefill"] == 3
        assert seen["fourfold_worker_moving", "p", "prefill"] == 4
        assert seen["fourfold_worker_step_tokens", "p", "prefill"] == 300
        assert seen["fourfold_worker_pages_in_use", "p", "prefill"] == 5
        assert seen["fourfold_worker_state", "p", "prefill", "ready"] == 1
        assert seen["fourfold_fleet_parts_total", "whole"] == 1
        assert seen["fourfold_fleet_retries_total", "worker_lost"] == 0
        assert seen["fourfold_fleet_parked_requests",] == 0
        path = ("d", "p", "sends", "tcp x2")
        assert seen["fourfold_transport_bytes_total", *path] == 4000
        assert seen["fourfold_transport_bytes_per_second", *path] == 2000
        assert seen["fourfold_transport_stale_total", *path] == 3
        # A test goes by the link's own way, whichever pages took.
        assert seen["fourfold_transport_tested_bytes_per_second", *path[:-1], SHARED_MEMORY] == 1e9
        # How fast the receiver copies, the sender does not know.
        shared = ("e", "p", "sends", SHARED_MEMORY)
        assert ("fourfold_transport_bytes_per_second", *shared) not in seen
        assert seen["fourfold_transport_tested_bytes_per_second", *shared] == 1e9

    go(main)
