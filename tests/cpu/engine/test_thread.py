"""The engine on its own thread, fed and interrupted from others."""

from __future__ import annotations

import gc
import math
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fourfold.engine import worker
from fourfold.engine.channel import Hello
from fourfold.engine.engine import Engine
from fourfold.engine.messages import (
    Abort,
    EngineStats,
    FinishReason,
    Role,
    SamplingParams,
    TokenOutput,
)
from tests.cpu.driving import load_tiny, make_engine, submit
from tests.cpu.instead import Instead

Find = Callable[[str], Path]
REQUESTS = 64


class Listener:
    """Collects news; `done` is set when `expected` samples have ended."""

    def __init__(self, expected: int) -> None:
        self.news: dict[tuple[int, int], list[TokenOutput]] = defaultdict(list)
        self.done = threading.Event()
        self._left = expected

    def __call__(self, outputs: list[TokenOutput]) -> None:
        assert outputs, "news without anything new"
        for output in outputs:
            self.news[output.request_id, output.index].append(output)
            self._left -= output.finish is not None
        if not self._left:
            self.done.set()


def wait_until_idle(engine: Engine) -> None:
    """The last news is emitted before the engine looks at its inbox and notes what is in use."""
    deadline = time.monotonic() + 10
    while engine.stats.pages_in_use or engine.stats.running or engine.stats.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_request_ends_once_while_others_are_aborted(checkpoint: Find) -> None:
    random = Random(0)
    engine = make_engine(
        load_tiny(checkpoint("mixtral")), pages=24, max_running=12, step_tokens=120
    )
    lengths = {request_id: random.randint(1, 30) for request_id in range(REQUESTS)}
    samples = {request_id: random.choice([1, 1, 2]) for request_id in lengths}
    requests = [
        submit(
            request_id,
            [request_id % 5 + 3] * random.randint(1, 150),
            SamplingParams(max_tokens=lengths[request_id], seed=request_id),
            n=samples[request_id],
        )
        for request_id in lengths
    ]
    doomed = random.sample(range(REQUESTS), 20)
    listener = Listener(sum(samples.values()))

    def abort() -> None:
        for request_id in [*doomed, *doomed]:
            time.sleep(random.random() / 100)
            engine.abort(Abort(request_id=request_id))

    aborter = threading.Thread(target=abort)
    engine.start(listener)
    try:
        for request in requests[: REQUESTS // 2]:
            engine.submit(request)
        aborter.start()
        for request in requests[REQUESTS // 2 :]:
            engine.submit(request)
            time.sleep(0.002)
        assert listener.done.wait(60)
        aborter.join()
        wait_until_idle(engine)
    finally:
        engine.stop()
    for request_id, count in samples.items():
        for index in range(count):
            outputs = listener.news[request_id, index]
            finishes = [output.finish for output in outputs]
            assert finishes[:-1] == [None] * (len(outputs) - 1)
            if finishes[-1] is FinishReason.CANCELLED:
                assert request_id in doomed
            else:
                assert finishes[-1] is FinishReason.LENGTH
                assert len(outputs) == lengths[request_id]
    assert any(outputs[-1].finish is FinishReason.CANCELLED for outputs in listener.news.values())
    assert engine.scheduler.pool.in_use == 0


def test_stop_ends_the_thread_while_requests_run(checkpoint: Find) -> None:
    engine = make_engine(load_tiny(checkpoint("llama")))
    heard = threading.Event()
    engine.start(lambda outputs: heard.set())
    engine.submit(submit(0, [5] * 10, SamplingParams(max_tokens=10_000, temperature=0.0)))
    assert heard.wait(10)
    engine.stop()
    heard.clear()
    assert not heard.wait(0.05)
    assert "engine" not in {thread.name for thread in threading.enumerate()}


def test_no_search_for_garbage_goes_through_the_model(checkpoint: Find) -> None:
    engine = make_engine(load_tiny(checkpoint("llama")))
    engine.start(lambda outputs: None)
    try:
        assert gc.get_freeze_count() > 10_000
    finally:
        engine.stop()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("hanging", ["step", "_hear"])
def test_a_step_or_message_that_hangs_shows(
    checkpoint: Find, hanging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(load_tiny(checkpoint("mixtral")), pages=8)
    begun, release = threading.Event(), threading.Event()

    def hang(*_: object) -> list[TokenOutput] | None:
        begun.set()
        release.wait(60)
        return [] if hanging == "_hear" else None

    monkeypatch.setattr(engine, hanging, hang)
    assert engine.turn_seconds == 0
    engine.start(lambda outputs: None)
    engine.abort(Abort(request_id=1))
    assert begun.wait(60)
    time.sleep(0.02)
    assert engine.turn_seconds >= 0.02
    release.set()
    deadline = time.monotonic() + 10
    while engine.turn_seconds:
        assert time.monotonic() < deadline
    engine.stop()
    assert engine.turn_seconds == 0


def test_graphs_are_recorded_once_it_is_quiet(
    checkpoint: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not between a request and the next of somebody who waits for answers."""
    engine = make_engine(load_tiny(checkpoint("mixtral")), pages=8)
    prepared: list[bool] = []
    quiet = threading.Event()

    def prepare() -> bool:
        prepared.append(engine.idle)
        assert engine.turn_seconds, "one that hangs is to be noticed"
        if len(prepared) == 3:
            quiet.set()
        return len(prepared) < 3

    def ask() -> None:
        engine.submit(submit(1, [5] * 10, SamplingParams(max_tokens=3)))
        while not news.get(timeout=60).finish:
            pass

    monkeypatch.setattr(engine._runner, "prepare", prepare)
    monkeypatch.setattr("fourfold.engine.engine._QUIET_SECONDS", 60.0)
    news: queue.SimpleQueue[TokenOutput] = queue.SimpleQueue()
    engine.start(lambda outputs: [*map(news.put, outputs)].clear(), alone=True)
    try:
        for _ in range(3):
            ask()
        assert not prepared
        monkeypatch.setattr("fourfold.engine.engine._QUIET_SECONDS", 0.01)
        ask()
        assert quiet.wait(60)
        ask()
    finally:
        engine.stop()
    assert prepared == [True] * 3


def test_a_worker_whose_engine_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging:
        stats = EngineStats()
        turn_seconds = 1e9

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(worker, "os", Instead(os, _exit=leave))
    hello = Hello("w", Role.BOTH, 1)
    told = worker.Worker(hello, None)
    told._engine = Hanging()  # type: ignore[assignment]
    with pytest.raises(SystemExit):
        told._tell(None)  # type: ignore[arg-type]


def test_a_device_that_is_lost_is_said_before_its_samples_fail(
    checkpoint: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a worker can end, and its samples go on elsewhere, instead of failing all it gets."""
    engine = make_engine(load_tiny(checkpoint("mixtral")), pages=8)
    usable = [True, False]
    monkeypatch.setattr(type(engine._runner), "usable", property(lambda self: usable.pop(0)))
    lost: list[int] = []
    engine.on_device_lost = lambda: lost.append(len(engine.scheduler.running))

    def fail(plan: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(engine._runner, "launch", fail)
    for request_id, told in ((1, []), (2, [1])):
        engine.submit(submit(request_id, [5] * 10, SamplingParams(max_tokens=5)))
        engine.receive(math.inf)
        [output] = engine.step() or []
        assert output.finish is FinishReason.FAILED
        assert lost == told


def test_a_worker_whose_device_is_lost_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(worker, "os", Instead(os, _exit=codes.append))
    worker._end_without_device()
    assert codes == [1]
