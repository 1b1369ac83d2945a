"""The end of a gateway: what runs is finished or told, what is not yet admitted is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from fourfold.engine.messages import Abort, FinishReason
from fourfold.errors import DrainingError, RequestError
from fourfold.gateway.generation import GenerationOptions
from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu.gateway.scripted import hear, make_gateway, text

PLAIN = GenerationOptions()
LONG = "the " * 2000
"""Long enough to be encoded on a thread."""


class SlowTokenizer(Tokenizer):
    """Encodes a long text when the test lets it, and to a few tokens."""

    gate = threading.Event()

    def encode(
        self, text: str, *, add_special_tokens: bool, quoted: Sequence[int] = ()
    ) -> list[int]:
        assert self.gate.wait(10)
        ids = super().encode(text, add_special_tokens=add_special_tokens, quoted=quoted)
        return ids[: self.kept]

    kept = 10


@pytest.fixture
def slow(tokenizer: Tokenizer) -> SlowTokenizer:
    SlowTokenizer.gate.clear()
    fields = tokenizer.backend, tokenizer.chat_template, tokenizer.specials
    return SlowTokenizer(*fields, tokenizer.eos_token_ids)


def test_draining_waits_for_what_runs_and_admits_nothing(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        assert gateway.ready
        generation = await gateway.complete("x", PLAIN)
        draining = asyncio.create_task(gateway.drain(30))
        await asyncio.sleep(0)
        assert not gateway.ready
        with pytest.raises(DrainingError):
            await gateway.complete("y", PLAIN)
        await engine.say(generation, "half")
        assert not draining.done()
        await engine.say(generation, " done", finish=FinishReason.STOP)
        await asyncio.wait_for(draining, 1)
        assert text(await hear(generation)) == "half done"
        assert engine.aborted == []
        await gateway.stop()
        assert engine.stopped

    asyncio.run(main())


def test_draining_an_idle_gateway_takes_no_time(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", PLAIN)
        await engine.say(generation, "a", finish=FinishReason.STOP)
        await asyncio.wait_for(gateway.drain(30), 1)

    asyncio.run(main())


def test_draining_ends_what_takes_too_long(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generation = await gateway.complete("x", PLAIN)
        await engine.say(generation, "half")
        await gateway.drain(0.05)
        assert engine.aborted == [Abort(request_id=generation.request_id)]
        assert gateway.active == 0
        with pytest.raises(DrainingError, match="shutting down"):
            await hear(generation)

    asyncio.run(main())


def test_stopping_ends_everything(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        gateway, engine = make_gateway(tokenizer)
        generations = [await gateway.complete("x", PLAIN) for _ in range(3)]
        await gateway.stop()
        assert engine.stopped
        assert gateway.active == 0
        for generation in generations:
            with pytest.raises(DrainingError):
                await hear(generation)
        with pytest.raises(DrainingError):
            await gateway.complete("y", PLAIN)

    asyncio.run(main())


def test_draining_does_not_wait_for_a_request_that_was_refused(
    slow: SlowTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlowTokenizer, "kept", 1000)  # more than the context holds

    async def main() -> None:
        gateway, _ = make_gateway(slow)
        admitting = asyncio.create_task(gateway.complete(LONG, PLAIN))
        await asyncio.sleep(0)
        assert gateway.active == 1
        draining = asyncio.create_task(gateway.drain(8))
        await asyncio.sleep(0)
        slow.gate.set()
        with pytest.raises((RequestError, DrainingError)):
            await admitting
        await asyncio.wait_for(draining, 1)

    asyncio.run(main())


def test_a_request_on_its_way_in_is_served_or_refused_but_not_forgotten(
    slow: SlowTokenizer,
) -> None:
    """Its prompt is still being encoded when draining begins."""

    async def main() -> None:
        gateway, _ = make_gateway(slow)
        admitting = asyncio.create_task(gateway.complete(LONG, PLAIN))
        await asyncio.sleep(0)
        draining = asyncio.create_task(gateway.drain(8))
        await asyncio.sleep(0)
        slow.gate.set()
        try:
            generation = await asyncio.wait_for(admitting, 5)
        except DrainingError:
            await asyncio.wait_for(draining, 1)
        else:
            await asyncio.sleep(0.05)
            assert not draining.done(), "draining ended while a request was running"
            generation.cancel()
            await asyncio.wait_for(draining, 1)

    asyncio.run(main())


def test_nothing_is_admitted_once_draining_is_over(slow: SlowTokenizer) -> None:
    """It would start on an engine that is about to stop, and nobody would end it."""

    async def main() -> None:
        gateway, engine = make_gateway(slow)
        admitting = asyncio.create_task(gateway.complete(LONG, PLAIN))
        await asyncio.sleep(0)
        await gateway.drain(0.05)
        slow.gate.set()
        with pytest.raises(DrainingError):
            await asyncio.wait_for(admitting, 5)
        assert engine.submitted == []
        assert gateway.active == 0

    asyncio.run(main())
