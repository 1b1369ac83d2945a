"""An engine that says what a test tells it to say, and remembers what it was told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from fourfold.engine.messages import (
    Abort,
    EngineStats,
    FinishReason,
    Submit,
    TokenLogprob,
    TokenOutput,
)
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.gateway import Gateway
from fourfold.gateway.generation import Delta, Generation
from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu.gateway.made_tokenizers import VOCABULARY

Emit = Callable[[list[TokenOutput]], None]


class ScriptedEngine:
    """Implements `EngineClient`; computes nothing."""

    max_context = 256
    stats = EngineStats()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.submitted: list[Submit] = []
        self.aborted: list[Abort] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._emit: Emit | None = None

    def start(self, emit: Emit) -> None:
        self._emit = emit

    def stop(self) -> None:
        self.stopped = True

    def submit(self, request: Submit) -> None:
        self.submitted.append(request)

    def abort(self, message: Abort) -> None:
        self.aborted.append(message)

    async def emit(self, *outputs: TokenOutput) -> None:
        """News of one step; returns when the gateway has heard it."""
        assert self._emit is not None
        self._emit(list(outputs))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def say(
        self,
        generation: Generation,
        *words: str | int,
        index: int = 0,
        finish: FinishReason | None = None,
    ) -> None:
        """Texts (in as many tokens as it takes) and token ids, each token a step of its own."""
        tokens = [
            token
            for word in words
            for token in ([word] if isinstance(word, int) else self.encode(word))
        ]
        for place, token in enumerate(tokens, 1):
            await self.emit(
                TokenOutput(
                    request_id=generation.request_id,
                    index=index,
                    token=token,
                    logprob=TokenLogprob(token, -0.5, ((token, -0.5), (5, -1.5))),
                    finish=finish if place == len(tokens) else None,
                )
            )

    def encode(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def make_gateway(
    tokenizer: Tokenizer, limits: GatewayLimits | None = None
) -> tuple[Gateway, ScriptedEngine]:
    """A started gateway; call it on a running loop."""
    engine = ScriptedEngine(tokenizer)
    gateway = Gateway(
        engine,
        tokenizer,
        limits or GatewayLimits(),
        model_names=("scripted",),
        vocabulary=VOCABULARY,
    )
    gateway.start()
    return gateway, engine


async def hear(generation: Generation) -> list[Delta]:
    """Everything that is said of a request until it ends."""
    return [delta async for delta in generation]


def text(deltas: Sequence[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def data(deltas: Sequence[Delta], index: int = 0) -> bytes:
    """The bytes of all tokens that were reported."""
    return b"".join(
        token.data for delta in deltas if delta.index == index for token in delta.tokens
    )


def finishes(deltas: Sequence[Delta], index: int = 0) -> list[FinishReason]:
    return [delta.finish for delta in deltas if delta.index == index and delta.finish]
