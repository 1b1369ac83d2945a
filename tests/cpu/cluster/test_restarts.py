"""How often and how soon workers are started again, and on which device."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourfold.cluster import local
from fourfold.cluster.config import ClusterConfig
from fourfold.cluster.local import LocalWorkers
from fourfold.engine.building import EngineSetup, ModelFacts
from fourfold.engine.channel import LoadFailed, Ready
from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import EngineStats, Role
from fourfold.engine.placing import place
from fourfold.errors import CheckpointError, ConfigError, FourfoldError
from fourfold.gateway.fleet.members import CLOSED
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.transport.format import PageFormat
from fourfold.transport.peer import Peer
from tests.cpu.instead import Instead

PAGES = PageFormat(
    layers=1,
    kv_heads=1,
    head_width=1,
    page_tokens=1,
    code="int8",
    open_code="float32",
    record_bytes=1,
)
READY = Ready(
    ModelFacts(vocabulary=9, eos_token_ids=(), checkpoint="", fingerprint=""),
    64,
    EngineStats(),
    Peer(name="both-0", epoch=1, host="", port=1, pages=PAGES),
    "cpu",
)


@dataclasses.dataclass
class Process:
    """One that ends with a code as soon as somebody looks, or only when it is killed."""

    code: int | None = 0
    returncode: int | None = None

    def poll(self) -> int | None:
        self.returncode = self.code
        return self.returncode

    def kill(self) -> None:
        self.code = -9

    def wait(self, timeout: float | None = None) -> int | None:
        return self.poll()


class Watched:
    """Local workers whose processes are made up, and whose pauses take no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
        self.failures: list[FourfoldError] = []
        self.pauses: list[float] = []
        self.born: list[Any] = []
        self.process = Process()
        fleet: Any = SimpleNamespace(stopping=False, fail=self.failures.append, members=[])
        fleet.add = self._add
        self.fleet = fleet
        self.workers = LocalWorkers(fleet, [Role.BOTH] * count)
        self.spawn: Callable[[], Process] = lambda: self.process
        self.sleep = self._sleep
        starting = Instead(subprocess, Popen=lambda *_, **__: self.spawn())
        pausing = Instead(asyncio, sleep=lambda seconds: self.sleep(seconds))
        monkeypatch.setattr(local, "subprocess", starting)
        monkeypatch.setattr(local, "asyncio", pausing)

    def _add(self, connection: Any, **_: object) -> Any:
        connection.close()
        self.born.append(SimpleNamespace(number=len(self.born)))
        return self.born[-1]

    async def _sleep(self, seconds: float) -> None:
        if seconds >= 1:
            self.pauses.append(seconds)

    def start(self) -> None:
        self.workers.start()

    def ready(self, number: int = -1) -> None:
        self.fleet.on_event(self.born[number], READY, "")

    async def end(self, why: str = CLOSED, number: int = -1) -> None:
        """Of the processes that there were, the last ends; returns when it is dealt with."""
        self.fleet.on_event(self.born[number], None, why)
        await asyncio.gather(*self.workers._burials)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_one_that_keeps_ending_waits_ever_longer(watched: Watched) -> None:
    async def main() -> None:
        watched.start()
        for _ in range(7):
            watched.ready()
            await watched.end()
        assert watched.pauses == [1, 2, 4, 8, 16, 30, 30]
        assert len(watched.born) == 8
        assert not watched.failures

    asyncio.run(main())


def test_one_that_keeps_ending_for_days_is_started_again(watched: Watched) -> None:
    async def main() -> None:
        watched.start()
        for _ in range(2000):
            watched.ready()
            await watched.end()
        assert watched.pauses[-1] == 30
        assert len(watched.born) == 2001

    asyncio.run(main())


def test_one_that_cannot_load_ends_the_server_only_with_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        watched = Watched(monkeypatch, 2)
        watched.start()
        watched.ready(0)
        watched.ready(1)
        watched.fleet.members = [SimpleNamespace(takes_requests=True)]
        await watched.end(number=1)
        for _ in range(5):
            await watched.end()
        watched.fleet.members = []
        await watched.end()
        assert not watched.failures, "the other one may be back soon"
        await watched.end(number=0)
        for _ in range(3):
            assert not watched.failures
            await watched.end()
        assert len(watched.failures) == 1

    asyncio.run(main())


def test_one_that_dies_while_others_load_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        watched = Watched(monkeypatch, 2)
        go_on = asyncio.Event()

        async def sleep(seconds: float) -> None:
            await go_on.wait()

        watched.sleep = sleep
        watched.start()
        loading = asyncio.create_task(watched.workers.load(lambda done, total: None))
        await asyncio.wait({loading}, timeout=0.01)
        watched.ready(0)
        watched.fleet.on_event(watched.born[0], None, CLOSED)
        watched.ready(1)
        await asyncio.wait({loading}, timeout=0.01)
        assert not loading.done(), "its loop would end before the worker is started"
        go_on.set()
        await loading
        assert len(watched.born) == 3

    asyncio.run(main())


def test_a_long_life_is_a_new_start(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        watched.start()
        for _ in range(3):
            watched.ready()
            await watched.end()
        monkeypatch.setattr(local, "_LONG_LIFE", -1.0)
        watched.ready()
        await watched.end()
        assert watched.pauses == [1, 2, 4, 1]

    asyncio.run(main())


@pytest.mark.parametrize("said", [True, False])
def test_three_failed_loads_in_a_row_end_the_server(said: bool, watched: Watched) -> None:
    async def main() -> None:
        watched.process.code = 3
        watched.start()
        for loads in (True, False, False, True, False, False, False):
            assert not watched.failures
            if loads:
                watched.ready()
            elif said:
                watched.fleet.on_event(watched.born[-1], LoadFailed("CheckpointError", "no"), "")
            await watched.end()
        [failure] = watched.failures
        if said:
            assert isinstance(failure, CheckpointError)
            assert str(failure) == "no"
        else:
            assert "ended with exit code 3 while it was loading" in str(failure)

    asyncio.run(main())


def test_what_cannot_be_started_now_is_tried_later(watched: Watched) -> None:
    async def main() -> None:
        watched.start()
        watched.ready()
        answers: list[Any] = [OSError("too many processes"), watched.process]

        def spawn() -> Process:
            answer = answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

        watched.spawn = spawn
        await watched.end()
        assert watched.pauses == [1, 30]
        assert len(watched.born) == 2

    asyncio.run(main())


def test_one_that_is_silent_is_killed_at_once(watched: Watched) -> None:
    async def main() -> None:
        watched.process.code = None
        watched.start()
        watched.ready()
        await watched.end("it said nothing for 3.1 seconds")
        assert watched.process.code == -9
        assert len(watched.born) == 2

    asyncio.run(main())


def test_nothing_is_started_once_the_server_stops(watched: Watched) -> None:
    async def main() -> None:
        watched.start()
        watched.ready()
        watched.fleet.stopping = True
        await watched.end()
        assert len(watched.born) == 1

    asyncio.run(main())


def test_roles_name_the_workers() -> None:
    roles = ClusterConfig(prefill=1, decode=2).roles
    names = [name for name, _ in local._named(roles)]
    assert names == ["prefill-0", "decode-0", "decode-1"]
    assert ClusterConfig().roles == (Role.BOTH,)
    assert ClusterConfig(workers=2, prefill=1).roles == (Role.BOTH, Role.BOTH, Role.PREFILL)


def on(device: str, *, memory: float | None = None) -> EngineSetup:
    source = Source(SourceKind.DIRECTORY, Path("/nowhere"), "model")
    return EngineSetup(source=source, device=device, config=EngineConfig(kv_memory_gib=memory))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_workers_are_dealt_out_over_the_gpus(gpus: Callable[[int], None]) -> None:
    gpus(2)
    for device in ("auto", "cuda"):
        assert [place(on(device), i, 2).device for i in range(2)] == ["cuda:0", "cuda:1"]
        setups = [place(on(device, memory=1.0), i, 3) for i in range(3)]
        assert [setup.device for setup in setups] == ["cuda:0", "cuda:1", "cuda:0"]
    assert place(on("auto"), 1, 3).device == "cuda:1", "it has that one for itself"


@pytest.mark.parametrize(("device", "ordinal"), [("auto", 0), ("cuda", 2), ("cuda:1", 1)])
def test_workers_that_share_a_gpu_need_budgets(
    device: str, ordinal: int, gpus: Callable[[int], None]
) -> None:
    gpus(2)
    with pytest.raises(ConfigError, match=r"share the GPU cuda:.*--kv-memory-gib"):
        place(on(device), ordinal, 3)
    place(on(device, memory=1.0), ordinal, 3)


def test_workers_on_a_cpu_are_where_they_were_told(gpus: Callable[[int], None]) -> None:
    gpus(0)
    for device in ("auto", "cpu"):
        assert place(on(device), 1, 2) == on(device)
