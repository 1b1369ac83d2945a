"""The gateway: from a caller's request to an engine's messages, and from tokens back to text.

Lives on one asyncio loop. The engine's news arrives there once a step and is handed to the request
it belongs to; every admitted request ends exactly once, whatever ends it: the engine, a stop
string, its caller going away, or its deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from fourfold.engine.messages import Abort, EngineStats, Submit, TokenOutput
from fourfold.errors import (
    DrainingError,
    FourfoldError,
    OverloadedError,
    RequestError,
    RequestFailedError,
)
from fourfold.gateway.budget import check_budget
from fourfold.gateway.chat_template import ChatTemplate
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.generation import Generation, GenerationOptions
from fourfold.gateway.quoting import Prompt, Quoting
from fourfold.gateway.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Tokenising more than this many characters would hold the loop up; a thread does it.
_LONG_TEXT = 4096
_RETRY_AFTER = 1.0
_DRAINING = "the server is shutting down; send the request elsewhere"


class Emit(Protocol):
    """Takes in an engine's news, from any thread."""

    def __call__(self, outputs: list[TokenOutput], since: float | None = None, /) -> None:
        """`since` is when the engine had them, by `time.perf_counter`; None means now."""


class EngineClient(Protocol):
    """An engine as the gateway sees it, wherever it runs."""

    @property
    def max_context(self) -> int: ...
    @property
    def stats(self) -> EngineStats: ...
    def start(self, emit: Emit) -> None: ...
    def stop(self) -> None: ...
    def submit(self, request: Submit) -> None: ...
    def abort(self, message: Abort) -> None: ...


class GatewayStats(msgspec.Struct, kw_only=True):
    """What the gateway's own work took since the start, in seconds of this process."""

    tokenize_seconds: float = 0.0
    """Rendering and tokenising prompts."""
    admit_seconds: float = 0.0
    """Checking the budgets of requests that are admitted, choosing workers and telling them."""
    detokenize_seconds: float = 0.0
    """Turning tokens to text, with stop strings."""
    news: int = 0
    """Messages of the engine that brought tokens."""
    news_delay_seconds: float = 0.0
    """From when the engine had them until they were taken in."""


class GatewaySnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers for /metrics, as of now."""

    active_requests: int
    engine: EngineStats
    gateway: GatewayStats


class Gateway:
    """Admits requests for one model. Use it on the loop that `start` was called on."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        limits: GatewayLimits,
        *,
        model_names: Sequence[str],
        vocabulary: int,
    ) -> None:
        self.model_names = tuple(model_names)
        self.limits = limits
        self.created = int(time.time())
        self.draining = False
        self.failure: FourfoldError | None = None
        """Why nothing is computed any more, once the engine has ended by itself."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._chat: Quoting | None = None
        if tokenizer.chat_template is not None:
            template = ChatTemplate(tokenizer.chat_template, tokenizer.specials)
            self._chat = Quoting(template, tokenizer.marks.values())
        self._vocabulary = vocabulary
        self._ids = itertools.count(1)
        self._active: dict[int, Generation] = {}
        self._admitting = 0
        self._stats = GatewayStats()
        self._on_failure: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._all_ended = asyncio.Event()

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together at most."""
        return self._engine.max_context

    @property
    def ready(self) -> bool:
        return self._loop is not None and not self.draining

    @property
    def active(self) -> int:
        """Requests held now, waiting or running."""
        return len(self._active) + self._admitting

    def snapshot(self) -> GatewaySnapshot:
        return GatewaySnapshot(
            active_requests=self.active, engine=self._engine.stats, gateway=self._stats
        )

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Starts the engine; its news will be handled on the running loop. `on_failure` is called
        there if the engine ends by itself (see `failure`)."""
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._on_failure = on_failure

        def emit(outputs: list[TokenOutput], since: float | None = None) -> None:
            since = time.perf_counter() if since is None else since
            loop.call_soon_threadsafe(self._deliver, outputs, since)

        self._engine.start(emit)

    async def stop(self) -> None:
        """Ends what still runs, then the engine."""
        self.abort_all()
        self.draining = True
        await asyncio.to_thread(self.halt)

    def halt(self) -> None:
        """Ends the engine alone, for a process that ends without its loop; waits for a step."""
        self._engine.stop()

    async def drain(self, timeout: float) -> None:
        """Admits nothing more and waits for what runs; cancels the rest after `timeout` seconds."""
        self.draining = True
        if self.active:
            self._all_ended.clear()
            try:
                await asyncio.wait_for(self._all_ended.wait(), timeout)
            except TimeoutError:
                self.abort_all()

    def fail(self, failure: FourfoldError) -> None:
        """Ends every request because the engine has ended; admits nothing more."""
        self.failure, self.draining = failure, True
        for generation in list(self._active.values()):
            generation.cancel(RequestFailedError(f"the request was lost: {failure}"))
        self._on_failure()

    def fail_soon(self, failure: FourfoldError) -> None:
        """`fail`, for the engine's own thread."""
        assert self._loop is not None, "the engine runs, so the gateway was started"
        self._loop.call_soon_threadsafe(self.fail, failure)

    def abort_all(self) -> None:
        for generation in list(self._active.values()):
            generation.cancel(DrainingError("the server is shutting down and ended the request"))

    async def chat(
        self, messages: Sequence[Mapping[str, str]], options: GenerationOptions
    ) -> Generation:
        """Admits a conversation. Raises `RequestError`, `OverloadedError` or `DrainingError`."""
        if self._chat is None:
            raise RequestError(
                f"{self.model_names[0]} has no chat template; send a prompt to "
                "be continued instead of messages (/v1/completions)",
                param="messages",
            )
        began = time.perf_counter()
        prompt = self._chat.render(messages)
        self._stats.tokenize_seconds += time.perf_counter() - began
        return await self._admit(prompt, options, "messages")

    async def complete(self, prompt: str | Sequence[int], options: GenerationOptions) -> Generation:
        """Admits a text or token ids to be continued. Raises as `chat` does."""
        given = Prompt(prompt) if isinstance(prompt, str) else prompt
        return await self._admit(given, options, "prompt")

    async def _admit(
        self, prompt: Prompt | Sequence[int], options: GenerationOptions, field: str
    ) -> Generation:
        """Admits a prompt that came in the request's `field`. Only a plain text still wants the
        tokens that begin one; a rendered conversation brings its own."""
        add_special_tokens = field == "prompt"
        if self.draining or self._loop is None:
            raise DrainingError(_DRAINING)
        if self.active >= self.limits.max_concurrent:
            raise OverloadedError(
                f"{self.active} requests are held already; try again later",
                retry_after=_RETRY_AFTER,
            )
        self._admitting += 1
        try:
            ids = await self._encode(prompt, add_special_tokens, field)
            if self.draining:
                raise DrainingError(_DRAINING)
            began = time.perf_counter()
            request = self._request(ids, options, field)
            generation = Generation(
                request,
                self._tokenizer,
                stop=options.stop,
                prompt_text=prompt.text if isinstance(prompt, Prompt) else None,
                abort=self._engine.abort,
                on_end=self._ended,
            )
            self._active[request.request_id] = generation
        finally:
            self._admitting -= 1
            self._note_end()
        generation.expire_after(self.limits.request_timeout)
        self._engine.submit(request)
        self._stats.admit_seconds += time.perf_counter() - began
        return generation

    async def _encode(
        self, prompt: Prompt | Sequence[int], add_special_tokens: bool, field: str
    ) -> list[int]:
        if not isinstance(prompt, Prompt):
            return list(prompt)
        text, quoted = prompt
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(
                "the text holds half of a surrogate pair, which is no character; remove it",
                param=field,
            ) from None

        def encode() -> tuple[list[int], float]:
            began = time.perf_counter()
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, quoted=quoted)
            return ids, time.perf_counter() - began

        is_long = len(text) > _LONG_TEXT
        ids, seconds = await asyncio.to_thread(encode) if is_long else encode()
        self._stats.tokenize_seconds += seconds
        return ids

    def _request(self, ids: list[int], options: GenerationOptions, field: str) -> Submit:
        strange = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if strange is not None:
            raise RequestError(
                f"the prompt holds token {strange}; the vocabulary ends at {self._vocabulary - 1}",
                param="prompt",
            )
        max_tokens = check_budget(
            options,
            len(ids),
            self.limits,
            vocabulary=self._vocabulary,
            context_length=self.context_length,
            prompt_field=field,
        )
        sampling = options.sampling
        ends = () if options.ignore_eos else self._tokenizer.eos_token_ids
        stops = dict.fromkeys((*sampling.stop_token_ids, *ends))
        return Submit(
            request_id=next(self._ids),
            prompt_ids=tuple(ids),
            n=options.n,
            sampling=msgspec.structs.replace(
                sampling,
                max_tokens=max_tokens,
                stop_token_ids=tuple(stops),
                seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            ),
        )

    def _deliver(self, outputs: Sequence[TokenOutput], since: float) -> None:
        began = time.perf_counter()
        for output in outputs:
            generation = self._active.get(output.request_id)
            if generation is None:
                continue
            try:
                generation.receive(output)
            except Exception as error:  # the others' tokens must not be lost with this one
                logger.exception("news of request %d could not be taken in", output.request_id)
                why = f"its answer could not be put together: {type(error).__name__}: {error}"
                generation.cancel(RequestFailedError(why))
        stats = self._stats
        stats.detokenize_seconds += time.perf_counter() - began
        stats.news += 1
        stats.news_delay_seconds += began - since

    def _ended(self, request_id: int) -> None:
        self._active.pop(request_id, None)
        self._note_end()

    def _note_end(self) -> None:
        if not self.active:
            self._all_ended.set()
