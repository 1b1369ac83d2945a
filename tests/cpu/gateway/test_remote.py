"""A gateway whose engine is another process: the same answers, and either may die."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fourfold.engine.building import EngineSetup
from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import FinishReason, SamplingParams
from fourfold.errors import (
    CheckpointError,
    ConfigError,
    DrainingError,
    FourfoldError,
    RequestFailedError,
)
from fourfold.gateway.gateway import Gateway
from fourfold.gateway.generation import GenerationOptions
from fourfold.gateway.local import GatewaySetup, make_gateway
from fourfold.gateway.remote import RemoteEngine, make_remote_gateway
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


def process_of(gateway: Gateway) -> int:
    engine = gateway._engine
    assert isinstance(engine, RemoteEngine)
    return engine._process.pid


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
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


def test_answers_are_those_of_an_engine_in_this_process(setup: Setup) -> None:
    async def main(gateway: Gateway) -> list[str]:
        gateway.start()
        try:
            answers = await ask(gateway)
            # The last numbers come without any other news.
            await eventually(lambda: gateway.snapshot().engine.pages_in_use == 0)
            seen = gateway.snapshot()
            assert seen.engine.generated_tokens == 40 * 2 * 12
            assert seen.engine.steps > 0
            assert seen.engine.pages_total > 0
            assert seen.gateway.news > 0
            assert seen.gateway.news_delay_seconds > 0
            return answers
        finally:
            await gateway.stop()

    told: list[tuple[int, int]] = []
    remote = make_remote_gateway(setup(), lambda done, total: told.append((done, total)))
    pid = process_of(remote)
    local = make_gateway(setup())
    assert remote.context_length == local.context_length
    assert asyncio.run(main(remote)) == asyncio.run(main(local))
    assert told[-1][0] == told[-1][1] > 0, "progress was told to the end"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert remote.failure is None


def test_what_cannot_be_loaded_is_said_as_here(setup: Setup, tmp_path: Path) -> None:
    wrong = setup(device="no such device")
    with pytest.raises(ConfigError) as here:
        make_gateway(wrong)
    with pytest.raises(ConfigError) as there:
        make_remote_gateway(wrong)
    assert str(there.value) == str(here.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as checkpoint_error:
        make_remote_gateway(setup(tmp_path / "empty"))
    assert str(tmp_path) in str(checkpoint_error.value)


def test_an_engine_that_dies_ends_every_request(setup: Setup) -> None:
    async def main(gateway: Gateway) -> None:
        failed = asyncio.Event()
        gateway.start(on_failure=failed.set)
        running = await gateway.complete("the rain", ENDLESS)
        waiting = [await gateway.complete("in spain", ENDLESS) for _ in range(12)]
        await anext(aiter(running))
        os.kill(process_of(gateway), signal.SIGKILL)
        await asyncio.wait_for(failed.wait(), 10)
        for generation in (running, *waiting):
            with pytest.raises(RequestFailedError, match=r"lost.*SIGKILL"):
                await asyncio.wait_for(hear(generation), 1)
        assert gateway.active == 0
        assert not gateway.ready
        assert "SIGKILL" in str(gateway.failure)
        with pytest.raises(DrainingError):
            await gateway.complete("another", ENDLESS)
        await asyncio.wait_for(gateway.stop(), 5)

    asyncio.run(main(make_remote_gateway(setup())))


def test_stopping_ends_what_runs_and_the_process(setup: Setup) -> None:
    async def main(gateway: Gateway) -> None:
        gateway.start(on_failure=lambda: pytest.fail("it was stopped"))
        running = [await gateway.complete("the rain", ENDLESS) for _ in range(3)]
        await anext(aiter(running[0]))
        await gateway.stop()
        for generation in running:
            with pytest.raises(DrainingError):
                await hear(generation)

    gateway = make_remote_gateway(setup())
    asyncio.run(main(gateway))
    with pytest.raises(ProcessLookupError):
        os.kill(process_of(gateway), 0)
    assert gateway.failure is None


def test_more_prompts_at_once_than_the_socket_holds(setup: Setup) -> None:
    async def main(gateway: Gateway) -> None:
        gateway.start()
        prompt = [5, 6, 7, 300] * 200
        options = GenerationOptions(sampling=GREEDY, max_tokens=1, ignore_eos=True)
        generations = [await gateway.complete(prompt, options) for _ in range(250)]
        for generation in generations:
            assert finishes(await hear(generation)) == [FinishReason.LENGTH]
        await gateway.stop()

    asyncio.run(main(make_remote_gateway(setup())))


def test_a_process_that_dies_while_loading_is_said_so(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = RemoteEngine(setup().engine)
    os.kill(engine._process.pid, signal.SIGKILL)
    with pytest.raises(FourfoldError, match=r"SIGKILL.*while it was loading"):
        engine.wait_until_ready(lambda done, total: None)
    engine.kill()
