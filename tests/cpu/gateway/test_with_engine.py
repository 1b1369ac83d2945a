"""The gateway on an engine that computes: answers equal the engine's own, and nothing is left."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fourfold.engine.engine import Engine
from fourfold.engine.messages import FinishReason, SamplingParams
from fourfold.errors import RequestFailedError
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.gateway import Gateway
from fourfold.gateway.generation import GenerationOptions
from fourfold.gateway.tokenizer import Tokenizer
from fourfold.models.decoder import Decoder
from tests.cpu import driving
from tests.cpu.gateway.made_tokenizers import VOCABULARY
from tests.cpu.gateway.scripted import data, finishes, hear, text

GREEDY = SamplingParams(temperature=0.0)
CLIENTS = 64


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Decoder:
    return driving.load_tiny(checkpoint("mixtral"))


@pytest.fixture
def engine(model: Decoder) -> Iterator[Engine]:
    engine = driving.make_engine(model, pages=48, max_running=8, step_tokens=64)
    yield engine
    engine.stop()


def make_gateway(engine: Engine, tokenizer: Tokenizer) -> Gateway:
    """Started; call it on a running loop."""
    gateway = Gateway(
        engine, tokenizer, GatewayLimits(), model_names=("tiny",), vocabulary=VOCABULARY
    )
    gateway.start()
    return gateway


async def settle(engine: Engine) -> None:
    """Until the engine has heard of every abort."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stats = engine.stats
        if stats.pages_in_use == stats.running == stats.waiting == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"pages or samples are left: {engine.stats}")


def greedy_text(model: Decoder, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    [answer] = driving.generate(driving.make_engine(model), [ids], params)
    return tokenizer.decode(answer)


def test_text_is_that_of_the_engines_tokens(
    model: Decoder, engine: Engine, tokenizer: Tokenizer
) -> None:
    wanted = greedy_text(model, tokenizer, "the rain", 60)

    async def main() -> None:
        gateway = make_gateway(engine, tokenizer)
        options = GenerationOptions(sampling=GREEDY, max_tokens=60, ignore_eos=True, n=2)
        generation = await gateway.complete("the rain", options)
        deltas = await hear(generation)
        for index in range(2):
            assert text(deltas, index) == wanted
            assert finishes(deltas, index) == [FinishReason.LENGTH]
        assert generation.usage.completion_tokens == 120
        await settle(engine)

    asyncio.run(main())


def test_a_stop_string_cuts_the_text_and_frees_the_pages(
    model: Decoder, engine: Engine, tokenizer: Tokenizer
) -> None:
    whole = greedy_text(model, tokenizer, "the rain", 60)
    stop = whole[20:24]
    wanted = whole[: whole.find(stop)]

    async def main() -> None:
        gateway = make_gateway(engine, tokenizer)
        sampling = SamplingParams(temperature=0.0, logprobs=2)
        options = GenerationOptions(sampling=sampling, ignore_eos=True, stop=(stop,))
        generation = await gateway.complete("the rain", options)
        deltas = await asyncio.wait_for(hear(generation), 30)
        assert text(deltas) == wanted
        assert finishes(deltas) == [FinishReason.STOP]
        assert data(deltas).decode(errors="replace").startswith(wanted)
        assert generation.usage.completion_tokens <= 60
        await settle(engine)

    asyncio.run(main())


def test_many_clients_of_whom_some_leave(engine: Engine, tokenizer: Tokenizer) -> None:
    """More clients than the engine runs at once and than its pages hold."""
    ended = {"served": 0, "left": 0}

    async def client(gateway: Gateway, number: int) -> None:
        chance = random.Random(number)
        await asyncio.sleep(chance.random() * 0.2)
        prompt = "the rain in spain " * chance.randrange(1, 12) + str(number % 5)
        options = GenerationOptions(
            sampling=SamplingParams(seed=number, logprobs=number % 2 or None),
            max_tokens=chance.randrange(1, 60),
            n=chance.randrange(1, 4),
            ignore_eos=True,
        )
        generation = await gateway.complete(prompt, options)
        leaves_after = chance.choice([None, 0, 1, 7, 30])
        seen = 0
        finished = 0
        if leaves_after == 0:
            generation.cancel()
        try:
            async for delta in generation:
                seen += 1
                finished += delta.finish is not None
                if seen == leaves_after:
                    break
        except RequestFailedError:
            assert leaves_after == 0
        generation.cancel()
        served = finished == options.n
        assert served or leaves_after is not None
        ended["served" if served else "left"] += 1

    async def main() -> None:
        gateway = make_gateway(engine, tokenizer)
        async with asyncio.timeout(60), asyncio.TaskGroup() as clients:
            for number in range(CLIENTS):
                clients.create_task(client(gateway, number))
        assert gateway.active == 0
        await settle(engine)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert gateway.snapshot().active_requests == 0
        await gateway.stop()

    asyncio.run(main())
    assert sum(ended.values()) == CLIENTS
    assert min(ended.values()) >= 8, "both ways of ending were tried"


def test_the_same_seed_gives_the_same_text_in_any_company(
    engine: Engine, tokenizer: Tokenizer
) -> None:
    async def main() -> None:
        gateway = make_gateway(engine, tokenizer)
        options = GenerationOptions(
            sampling=SamplingParams(seed=11), max_tokens=20, ignore_eos=True
        )
        alone = text(await hear(await gateway.complete("spain", options)))
        others = [await gateway.complete(f"rain {i}", options) for i in range(6)]
        again = await gateway.complete("spain", options)
        assert text(await hear(again)) == alone
        for other in others:
            other.cancel()
        await settle(engine)

    asyncio.run(main())
