"""A gateway whose engines are other processes: the same answers, and either may die."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourfold.cluster import cluster as clusters
from fourfold.cluster.cluster import Cluster, make_cluster
from fourfold.cluster.config import ClusterConfig
from fourfold.cluster.local import LocalWorkers
from fourfold.engine.building import EngineSetup
from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import FinishReason, SamplingParams
from fourfold.errors import (
    CheckpointError,
    DrainingError,
    FourfoldError,
)
from fourfold.gateway.fleet.config import FleetConfig
from fourfold.gateway.fleet.fleet import Fleet
from fourfold.gateway.fleet.members import Member, State
from fourfold.gateway.gateway import Gateway
from fourfold.gateway.generation import GenerationOptions
from fourfold.gateway.local import GatewaySetup, make_gateway
from fourfold.models.checkpoint.source import find_source
from fourfold.models.precision import Precision
from tests.cpu.gateway.made_tokenizers import write_default
from tests.cpu.gateway.scripted import finishes, hear, text

GREEDY = SamplingParams(temperature=0.0)
ENDLESS = GenerationOptions(sampling=GREEDY, ignore_eos=True)
Setup = Callable[..., GatewaySetup]


@pytest.fixture
def setup(checkpoint: Callable[[str], Path], tmp_path: Path) -> Setup:
    """A tiny model with few pages."""

    def make(model: Path | None = None, **engine: object) -> GatewaySetup:
        return GatewaySetup(
            engine=EngineSetup(
                source=find_source(str(model or checkpoint("mixtral"))),
                precision=Precision.FLOAT32,
                config=EngineConfig(kv_memory_gib=0.02, max_running=8, decode_threads=1),
                **({"device": "cpu"} | engine),  # type: ignore[arg-type]
            ),
            tokenizer=find_source(str(write_default(tmp_path / "words")), weights=False),
        )

    return make


def process_of(cluster: Cluster) -> int:
    """The worker's, which must be the only one."""
    [member] = cluster.fleet.members
    return member.hello.pid


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def ask(gateway: Gateway) -> list[str]:
    """Answers to many prompts at once, more than run together."""
    prompts = [f"the rain in spain {number} " * (1 + number % 4) for number in range(40)]
    options = GenerationOptions(
        sampling=SamplingParams(temperature=0.0, logprobs=2), max_tokens=12, n=2, ignore_eos=True
    )
    generations = [await gateway.complete(prompt, options) for prompt in prompts]
    heard = [await hear(generation) for generation in generations]
    for deltas in heard:
        assert [finishes(deltas, index) for index in (0, 1)] == [[FinishReason.LENGTH]] * 2
        assert sum(len(delta.tokens) for delta in deltas) == 24
    return [text(deltas, index) for deltas in heard for index in (0, 1)]


def test_answers_are_those_of_an_engine_in_this_process(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(start: Callable[[], None], gateway: Gateway) -> list[str]:
        start()
        answers = await ask(gateway)
        # The last numbers come without any other news.
        await eventually(lambda: gateway.snapshot().engine.pages_in_use == 0)
        seen = gateway.snapshot()
        assert seen.engine.generated_tokens == 40 * 2 * 12
        assert seen.engine.steps > 0
        assert seen.engine.pages_total > 0
        assert seen.gateway.news > 0
        assert seen.gateway.news_delay_seconds > 0
        if gateway is cluster.gateway:
            await ask_more_than_a_socket_holds(gateway)
        running = [await gateway.complete("the rain", ENDLESS) for _ in range(3)]
        await anext(aiter(running[0]))
        await gateway.stop()
        for generation in running:
            with pytest.raises(DrainingError):
                await hear(generation)
        return answers

    told: list[tuple[int, int]] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cluster = make_cluster(
        setup(device="auto"), progress=lambda done, total: told.append((done, total))
    )
    pid = process_of(cluster)
    [member] = cluster.fleet.members
    assert member.ready is not None
    assert member.ready.device == "cpu", "what it took, not what it was told"
    local = make_gateway(setup())
    assert cluster.gateway.context_length == local.context_length
    there = asyncio.run(main(cluster.start, cluster.gateway))
    assert there == asyncio.run(main(local.start, local))
    assert told[-1][0] == told[-1][1] > 0, "progress was told to the end"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert cluster.gateway.failure is None


async def ask_more_than_a_socket_holds(gateway: Gateway) -> None:
    prompt = [5, 6, 7, 300] * 200
    options = GenerationOptions(sampling=GREEDY, max_tokens=1, ignore_eos=True)
    generations = [await gateway.complete(prompt, options) for _ in range(250)]
    for generation in generations:
        assert finishes(await hear(generation)) == [FinishReason.LENGTH]


def test_what_cannot_be_loaded_is_said_as_here(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    wrong = setup(tmp_path / "empty")
    with pytest.raises(CheckpointError) as here:
        make_gateway(wrong)
    with pytest.raises(CheckpointError) as there:
        make_cluster(wrong)
    assert str(there.value) == str(here.value)


def test_no_token_is_lost_or_repeated_whichever_worker_dies(setup: Setup) -> None:
    """Killed or paused, with prompts or answers: all goes on after what was delivered."""
    options = GenerationOptions(sampling=GREEDY, max_tokens=60, n=2, ignore_eos=True)

    async def answers(gateway: Gateway, fault: Callable[[], None]) -> list[tuple[int, ...]]:
        prompts = ["the rain in spain " * (1 + number) for number in range(12)]
        generations = [await gateway.complete(prompt, options) for prompt in prompts]
        heard = [asyncio.create_task(hear(generation)) for generation in generations]
        await eventually(lambda: sum(len(g.token_ids(1)) > 5 for g in generations) >= 2)
        fault()
        for task in heard:
            deltas = await asyncio.wait_for(task, 60)
            assert [finishes(deltas, index) for index in (0, 1)] == [[FinishReason.LENGTH]] * 2
        return [generation.token_ids(index) for generation in generations for index in (0, 1)]

    async def main(cluster: Cluster) -> None:
        cluster.start(on_failure=lambda: pytest.fail("they are to be started again"))
        fleet, gateway = cluster.fleet, cluster.gateway

        def alive(name: str) -> list[int]:
            return [w.pid for w in fleet.workers if (w.name, w.state) == (name, State.READY)]

        expected = await answers(gateway, lambda: None)
        assert fleet.counts.cut > 0
        for name, number in [("prefill-0", signal.SIGKILL), ("decode-0", signal.SIGSTOP)]:
            await eventually(lambda name=name: alive(name))  # type: ignore[misc]
            [pid], lost = alive(name), fleet.counts.lost
            assert await answers(gateway, lambda: os.kill(pid, number)) == expected  # noqa: B023
            assert fleet.counts.lost > lost or name == "prefill-0"
            await eventually(lambda: running_nowhere(pid))  # noqa: B023
        await eventually(lambda: gateway.snapshot().engine.pages_in_use == 0)
        assert all(member.idle for member in fleet.members)
        await cluster.stop()

    roles = ClusterConfig(prefill=1, decode=1, fleet=FleetConfig(worker_timeout=2.0))
    asyncio.run(main(make_cluster(setup(), roles)))


def running_nowhere(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_process_that_dies_while_loading_is_said_so(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = LocalWorkers._start

    def start_and_kill(self: LocalWorkers, place: Any) -> None:
        start(self, place)
        os.kill(place.process.pid, signal.SIGKILL)

    monkeypatch.setattr(LocalWorkers, "_start", start_and_kill)
    with pytest.raises(FourfoldError, match=r"SIGKILL.*while it was loading"):
        make_cluster(setup())


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Waits until a worker has said hello and speaks again, for it was told what to load."""
    members: list[Member] = []
    connections: list[socket.socket] = []
    add = Fleet.add

    def noted(self: Fleet, connection: socket.socket, **where: Any) -> Member:
        connections.append(connection)
        members.append(add(self, connection, **where))
        return members[-1]

    def wait() -> None:
        assert [member.state for member in members] == [State.LOADING]
        assert select.select(connections, [], [], 60)[0], "it waits to be told"

    monkeypatch.setattr(Fleet, "add", noted)
    return wait


def test_the_tokenizer_is_read_while_the_model_loads(
    setup: Setup, loading: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = clusters.load_tokenizer

    def read_late(*arguments: Any, **options: Any) -> Any:
        loading()
        return load(*arguments, **options)

    monkeypatch.setattr(clusters, "load_tokenizer", read_late)
    cluster = make_cluster(setup())
    assert [worker.state for worker in cluster.fleet.workers] == [State.READY]

    async def stop() -> None:
        cluster.start()
        await cluster.stop()

    asyncio.run(stop())


@pytest.mark.parametrize("error", [CheckpointError("words"), KeyboardInterrupt()])
def test_what_ends_the_reading_of_a_tokenizer_ends_the_workers(
    error: BaseException,
    setup: Setup,
    loading: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pids: list[int] = []
    start = LocalWorkers._start

    def noted(self: LocalWorkers, place: Any) -> None:
        start(self, place)
        pids.append(place.process.pid)

    def fail(*_: Any, **__: Any) -> None:
        loading()
        raise error

    monkeypatch.setattr(LocalWorkers, "_start", noted)
    monkeypatch.setattr(clusters, "load_tokenizer", fail)
    with pytest.raises(type(error)) as caught:
        make_cluster(setup())
    assert caught.value is error
    [pid] = pids
    assert running_nowhere(pid)
    assert not caplog.records, "nothing is left over on the loop"
