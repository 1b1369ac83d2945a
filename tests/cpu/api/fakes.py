"""A gateway without a neural network: it says what a test scripts and counts what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from fourfold.engine.messages import EngineStats, FinishReason
from fourfold.errors import DrainingError, FourfoldError, OverloadedError, RequestFailedError
from fourfold.gateway.gateway import GatewaySnapshot, GatewayStats
from fourfold.gateway.generation import Delta, GenerationOptions, TokenText, Usage

MODEL = "org/fake-moe"

Numbers = TypeVar("Numbers", EngineStats, GatewayStats)


def token(
    text: str | bytes, logprob: float | None = None, *top: TokenText, special: bool = False
) -> TokenText:
    """A token as the gateway reports it; bytes that are not UTF-8 show as U+FFFD."""
    data = text.encode() if isinstance(text, str) else text
    return TokenText(data.decode("utf-8", "replace"), data, len(data), logprob, top, special)


@dataclass(frozen=True, kw_only=True)
class Script:
    """What every generation says until the next script."""

    words: Sequence[str] = ("Hello", ",", " world")
    tokens: Sequence[tuple[TokenText, ...]] = ()
    """Tokens of each word, for logprobs."""
    prompt_tokens: tuple[TokenText, ...] = ()
    delay: float = 0.0
    """Seconds before each word."""
    finish: FinishReason = FinishReason.STOP
    refuse: Exception | None = None
    """Raised instead of admitting."""
    admit_delay: float = 0.0
    """Seconds before a request is admitted."""
    fail: Exception | None = None
    """Raised after `fail_after` words of each sample."""
    fail_after: int = 0
    cached_tokens: int = 0


class FakeGeneration:
    """Speaks the script: all samples in step, word by word, the last with the reason."""

    def __init__(
        self, script: Script, options: GenerationOptions, text: str, on_end: Callable[[bool], None]
    ) -> None:
        self.prompt_text = text
        self.prompt_tokens = script.prompt_tokens
        self._script = script
        self._options = options
        self._on_end = on_end
        self._cancelled = asyncio.Event()
        self._said = 0
        self._news: list[Delta] = []
        self._failure: Exception | None = None
        self._speaking: asyncio.Task[None] | None = None

    def listen(self, on_news: Callable[[], None]) -> None:
        self._speaking = asyncio.get_running_loop().create_task(self._speak(on_news))

    def take(self) -> tuple[list[Delta], Exception | None]:
        news, self._news = self._news, []
        return news, self._failure

    async def _speak(self, on_news: Callable[[], None]) -> None:
        try:
            async for delta in self:
                self._news.append(delta)
                on_news()
        except Exception as error:  # what a test scripted, or a fault of this fake
            self._failure = error
            on_news()

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt_text.split()),
            cached_tokens=self._script.cached_tokens,
            completion_tokens=self._said,
        )

    def cancel(self) -> None:
        self._cancelled.set()
        self._on_end(True)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        script, limit = self._script, self._options.max_tokens or self._options.up_to
        words = list(script.words)[:limit]
        finish = FinishReason.LENGTH if len(words) < len(script.words) else script.finish
        for position, word in enumerate(words):
            if script.fail and position == script.fail_after:
                raise script.fail
            if script.delay:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._cancelled.wait(), script.delay)
            if self._cancelled.is_set():
                raise RequestFailedError("the request was cancelled")
            last = position == len(words) - 1
            for index in range(self._options.n):
                self._said += 1
                yield Delta(
                    index=index,
                    text=word,
                    tokens=script.tokens[position] if script.tokens else (),
                    finish=finish if last else None,
                )
        self._on_end(False)


@dataclass(kw_only=True)
class FakeGateway:
    """The gateway's interface, with the budgets and the engine left out."""

    model_names: tuple[str, ...] = (MODEL, "default")
    created: int = 1_700_000_000
    context_length: int = 4096
    ready: bool = False
    draining: bool = False
    failure: FourfoldError | None = None
    capacity: int | None = None
    """Generations held at once at most."""
    script: Script = field(default_factory=Script)
    calls: list[tuple[Any, GenerationOptions]] = field(default_factory=list)
    """Every admitted prompt or conversation with its options."""
    held: dict[int, FakeGeneration] = field(default_factory=dict)
    cancelled: int = 0
    """Generations that were cancelled before their end."""

    @property
    def active(self) -> int:
        return len(self.held)

    def say(self, *words: str, **script: Any) -> None:
        """Scripts the next generations."""
        self.script = Script(words=words, **script)

    def reset(self) -> None:
        """As new, for the next test."""
        self.script, self.capacity, self.ready, self.cancelled = Script(), None, True, 0
        self.failure = None
        self.calls.clear()

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        self.ready = True

    async def stop(self) -> None:
        self.abort_all()

    async def chat(
        self, messages: Sequence[Mapping[str, str]], options: GenerationOptions
    ) -> FakeGeneration:
        text = "\n".join(message["content"] for message in messages)
        return await self._admit(messages, text, options)

    async def complete(
        self, prompt: str | Sequence[int], options: GenerationOptions
    ) -> FakeGeneration:
        text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
        return await self._admit(prompt, text, options)

    async def drain(self, timeout: float) -> None:
        self.draining, self.ready = True, False
        deadline = time.monotonic() + timeout
        while self.held and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.abort_all()

    def abort_all(self) -> None:
        for generation in list(self.held.values()):
            generation.cancel()

    def snapshot(self) -> GatewaySnapshot:
        return GatewaySnapshot(
            active_requests=self.active,
            engine=_numbered(EngineStats, 1),
            gateway=_numbered(GatewayStats, 101),
        )

    async def _admit(self, prompt: Any, text: str, options: GenerationOptions) -> FakeGeneration:
        script = self.script
        await asyncio.sleep(script.admit_delay)
        if self.draining:
            raise DrainingError("the server is shutting down; send the request elsewhere")
        if script.refuse:
            raise script.refuse
        if self.capacity is not None and self.active >= self.capacity:
            raise OverloadedError("the server is full; try again later", retry_after=1)
        self.calls.append((prompt, options))
        number = len(self.calls)

        def on_end(cancelled: bool) -> None:
            if self.held.pop(number, None):
                self.cancelled += cancelled

        self.held[number] = FakeGeneration(script, options, text, on_end)
        return self.held[number]


def _numbered(kind: type[Numbers], first: int) -> Numbers:
    """Every field with another number, none of them zero."""
    fields = msgspec.structs.fields(kind)
    return kind(**{f.name: type(f.default)(n) for n, f in enumerate(fields, first)})
