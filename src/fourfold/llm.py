"""`from fourfold import LLM`: a model in this process, to be asked from a program.

    with LLM("Qwen/Qwen3-30B-A3B", precision="w4a8") as llm:
        [answer] = llm.chat([{"role": "user", "content": "Hi"}], max_tokens=64)
        print(answer.text)

Requests are batched as in a server. Every method may be called from any thread, and the async ones
on any event loop.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import enum
import math
import queue
import sys
import threading
import weakref
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack, cast

import msgspec

from fourfold.engine.building import EngineSetup, Progress
from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import FinishReason
from fourfold.errors import ConfigError, DrainingError, RequestError, meant
from fourfold.gateway.config import GatewayLimits
from fourfold.gateway.gateway import Gateway
from fourfold.gateway.generation import Generation, GenerationOptions, TokenText, Usage
from fourfold.gateway.local import GatewaySetup, make_gateway
from fourfold.models.checkpoint.source import Source, find_source
from fourfold.models.precision import PageFormat, Precision

TokenIds = Sequence[int]
Conversation = Sequence[Mapping[str, str]]
"""Messages, each with a `role` and its `content`."""

# Nobody else can fill this process, and whoever waits can leave.
_LIMITS = GatewayLimits(max_concurrent=sys.maxsize, request_timeout=math.inf)

_OPTIONS = {field.name for field in msgspec.structs.fields(GenerationOptions)} - {"sampling"}

Value = TypeVar("Value")
Choice = TypeVar("Choice", bound=enum.StrEnum)


class Asked(TypedDict, total=False):
    """What may be asked of a request, by the names of `GenerationOptions` and `SamplingParams`."""

    max_tokens: int | None
    up_to: int | None
    n: int
    stop: str | Sequence[str]
    ignore_eos: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    logprobs: int | None
    prompt_logprobs: bool
    stop_token_ids: Sequence[int]


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to a prompt."""

    text: str
    token_ids: tuple[int, ...]
    """Every token that was generated, those of a stop string and the end of text included."""
    finish_reason: FinishReason
    tokens: tuple[TokenText, ...] = ()
    """The text's tokens with their log-probabilities, if `logprobs` was asked for."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one prompt: `n` samples."""

    samples: tuple[Sample, ...]
    usage: Usage
    prompt_tokens: tuple[TokenText, ...] = ()
    """The prompt's tokens with their log-probabilities, if `prompt_logprobs` was asked for."""

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.samples[0].text


class LLM:
    """A loaded model. Close it, or use it in a `with` statement, to give its memory back.

    Prompts are texts, continued as they are, or token ids; conversations are rendered by the
    model's chat template. What can be asked of a request stands in `Asked`. A request that cannot
    be served raises `RequestError`, one that fails on its way `RequestFailedError`.
    """

    def __init__(
        self,
        model: str | Path | Source | None = None,
        *,
        revision: str | None = None,
        tokenizer: str | Path | Source | None = None,
        device: str = "auto",
        precision: str = Precision.AUTO,
        dummy: bool = False,
        uniform_routing: bool = False,
        progress: Progress = lambda done, total: None,
        **config: Any,
    ) -> None:
        """Loads a model: a directory, a .gguf file or a hub id; None is the embedded default.

        `config` are the fields of `EngineConfig` (`kv_pages`, `max_running`, ...), and `dummy` and
        `uniform_routing` those of `EngineSetup`. `progress` is called with bytes read so far and
        bytes in all. Raises `CheckpointError` and `ConfigError`.
        """
        # What is wrong with these is known before a model is downloaded.
        fields = (field.name for field in dataclasses.fields(EngineConfig))
        known = (*(LLM.__init__.__kwdefaults__ or ()), *fields)
        for name in config.keys() - known:
            raise ConfigError(f"{name} is no option of an LLM; {meant(name, known)}")
        if "kv_pages" in config:
            config["kv_pages"] = _choice(PageFormat, "kv_pages", config["kv_pages"])
        budgets = EngineConfig(**config)
        chosen = _choice(Precision, "precision", precision)
        source = _source(model, revision, weights=True)
        engine = EngineSetup(
            source=source,
            device=device,
            precision=chosen,
            dummy=dummy,
            uniform_routing=uniform_routing,
            config=budgets,
        )
        words = source if tokenizer is None else _source(tokenizer, None, weights=False)
        setup = GatewaySetup(engine=engine, tokenizer=words, limits=_LIMITS)
        self._gateway = make_gateway(setup, progress)
        # As many wait as run on the largest device, so that a place in a batch is never empty.
        self._places = asyncio.Semaphore(2 * engine.config.on("cuda").running)
        begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(
            target=lambda gateway: asyncio.run(_serve(gateway, begun)),
            args=(self._gateway,),
            name="gateway",
            daemon=True,
        )
        self._thread.start()
        self._loop, over = begun.result()
        self._end = weakref.finalize(self, self._loop.call_soon_threadsafe, over.set)
        self._end.atexit = False  # it could not be waited for
        self._ending = threading.Lock()
        atexit.register(_halt, weakref.ref(self))

    @property
    def name(self) -> str:
        """The model's name."""
        return self._gateway.model_names[0]

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together at most."""
        return self._gateway.context_length

    def generate(
        self, prompts: str | TokenIds | Sequence[str] | Sequence[TokenIds], **asked: Unpack[Asked]
    ) -> list[Result]:
        """Continues one prompt or many; the results are in the order of the prompts."""
        return self._wait(self._answer_all(self._gateway.complete, _prompts(prompts), asked))

    def chat(
        self, messages: Conversation | Sequence[Conversation], **asked: Unpack[Asked]
    ) -> list[Result]:
        """Answers one conversation or many; the results are in their order."""
        return self._wait(self._answer_all(self._gateway.chat, _conversations(messages), asked))

    def stream(
        self, prompt: str | TokenIds | Conversation, **asked: Unpack[Asked]
    ) -> Generator[str]:
        """The text of one answer, piece by piece; a conversation is answered, anything else is
        continued. Leaving early ends the request."""
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        following = self._begin(self._follow(prompt, asked, pieces.put))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            following.result()
        finally:
            following.cancel()

    async def agenerate(
        self, prompts: str | TokenIds | Sequence[str] | Sequence[TokenIds], **asked: Unpack[Asked]
    ) -> list[Result]:
        """As `generate`."""
        answering = self._begin(self._answer_all(self._gateway.complete, _prompts(prompts), asked))
        return await asyncio.wrap_future(answering)

    async def achat(
        self, messages: Conversation | Sequence[Conversation], **asked: Unpack[Asked]
    ) -> list[Result]:
        """As `chat`."""
        answering = self._begin(
            self._answer_all(self._gateway.chat, _conversations(messages), asked)
        )
        return await asyncio.wrap_future(answering)

    async def astream(
        self, prompt: str | TokenIds | Conversation, **asked: Unpack[Asked]
    ) -> AsyncGenerator[str]:
        """As `stream`."""
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        following = self._begin(self._follow(prompt, asked, put))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await asyncio.wrap_future(following)
        finally:
            following.cancel()

    def close(self) -> None:
        """Ends what still runs and gives back what the model holds; harmless when repeated."""
        with self._ending:
            self._end()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _begin(self, work: Coroutine[Any, Any, Value]) -> Future[Value]:
        """Runs `work` on the gateway's loop."""
        with self._ending:  # what is handed over before the end is begun, and hears of it
            if self._end.alive:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise DrainingError("this LLM is closed; make another")

    def _wait(self, work: Coroutine[Any, Any, Value]) -> Value:
        future = self._begin(work)
        try:
            return future.result()
        finally:
            future.cancel()

    async def _answer_all(
        self,
        admit: Callable[[Any, GenerationOptions], Awaitable[Generation]],
        prompts: Sequence[Any],
        asked: Asked,
    ) -> list[Result]:
        options = options_of(asked)

        async def answer(prompt: Any) -> Result:
            async with self._places:
                return await _whole(await admit(prompt, options), options)

        tasks = [asyncio.create_task(answer(prompt)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, prompt: Any, asked: Asked, put: Callable[[str | None], None]) -> None:
        """Puts the pieces of an answer, and None at the end, whatever it is."""
        try:
            options = options_of(asked)
            if options.n != 1:
                raise RequestError(
                    f"n {options.n}: a stream has one answer; leave n out", param="n"
                )
            if options.sampling.logprobs is not None or options.sampling.prompt_logprobs:
                raise RequestError("a stream is text alone; leave logprobs out", param="logprobs")
            if _is_conversation(prompt):
                generation = await self._gateway.chat(prompt, options)
            else:
                generation = await self._gateway.complete(_prompt(prompt), options)
            try:
                async for delta in generation:
                    if delta.text:
                        put(delta.text)
            finally:
                generation.cancel()
        finally:
            put(None)


def _halt(llm: weakref.ref[LLM]) -> None:
    """Lets a running step end before the process does, which would crash it."""
    if (left := llm()) is not None:
        left._gateway.halt()


async def _serve(
    gateway: Gateway, begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]
) -> None:
    """The life of the gateway's thread."""
    over = asyncio.Event()
    gateway.start()
    begun.set_result((asyncio.get_running_loop(), over))
    await over.wait()
    await gateway.stop()
    # Whoever still waits is told why; returning at once would cancel them.
    asking = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*asking, return_exceptions=True)


async def _whole(generation: Generation, options: GenerationOptions) -> Result:
    texts = [""] * options.n
    tokens: list[tuple[TokenText, ...]] = [()] * options.n
    reasons: dict[int, FinishReason] = {}
    try:
        async for delta in generation:
            texts[delta.index] += delta.text
            tokens[delta.index] += delta.tokens
            if delta.finish is not None:
                reasons[delta.index] = delta.finish
    finally:
        generation.cancel()
    samples = [
        Sample(
            text=texts[index],
            token_ids=generation.token_ids(index),
            finish_reason=reasons[index],
            tokens=tokens[index],
        )
        for index in range(options.n)
    ]
    return Result(
        samples=tuple(samples),
        usage=generation.usage,
        prompt_tokens=generation.prompt_tokens if options.sampling.prompt_logprobs else (),
    )


def _prompts(given: Any) -> list[str | TokenIds]:
    """The texts and token ids of one prompt or many. Raises `RequestError`."""
    if isinstance(given, str) or (_is_list(given) and _first_is(given, Integral)):
        return [_prompt(given)]
    if not _is_list(given):
        raise _no_prompt(given)
    return [_prompt(prompt) for prompt in given]


def _prompt(given: Any) -> str | TokenIds:
    if isinstance(given, str):
        return given
    if _is_list(given) and all(isinstance(token, Integral) for token in given):
        return cast(TokenIds, given)
    raise _no_prompt(given)


def _no_prompt(given: Any) -> RequestError:
    return RequestError(
        f"a prompt is a text or a list of token ids, and not {given!r:.80}", param="prompt"
    )


def _conversations(given: Any) -> list[Conversation]:
    """One conversation or many. Raises `RequestError`."""
    many = [given] if _is_conversation(given) else given
    if not _is_list(many):
        many = [given]
    for talk in many:
        if not _is_conversation(talk):
            raise RequestError(
                "a conversation is a list of messages such as "
                f'{{"role": "user", "content": "Hi"}}, and not {talk!r:.80}',
                param="messages",
            )
    return list(many)


def _is_conversation(given: Any) -> bool:
    return _is_list(given) and len(given) > 0 and all(isinstance(each, Mapping) for each in given)


def _is_list(given: Any) -> bool:
    """Whether it has items in an order, and is no text: arrays have them, too."""
    if isinstance(given, str | bytes | bytearray | Mapping):
        return False
    return hasattr(given, "__len__") and hasattr(given, "__getitem__")


def _first_is(items: Sequence[Any], kind: Any) -> bool:
    return len(items) > 0 and isinstance(items[0], kind)


def options_of(asked: Asked) -> GenerationOptions:
    """What is asked, as the gateway takes it. `RequestError` if it cannot be read."""
    fields: dict[str, Any] = dict(asked)
    for name in fields.keys() - Asked.__annotations__.keys():
        known = ", ".join(Asked.__annotations__)
        raise RequestError(f"{name} is nothing a request can ask for; it is {known}", param=name)
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    own = {name: fields.pop(name) for name in _OPTIONS & fields.keys()}
    try:
        return msgspec.convert(own | {"sampling": fields}, GenerationOptions)
    except msgspec.ValidationError as error:
        raise RequestError(f"a request cannot be read: {error}") from error


def _choice(kind: type[Choice], name: str, value: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(kind)
        raise ConfigError(f"{name} {value!r} is not known; it is one of {known}") from None


def _source(model: str | Path | Source | None, revision: str | None, *, weights: bool) -> Source:
    if isinstance(model, Source):
        return model
    return find_source(
        str(model) if isinstance(model, Path) else model, revision=revision, weights=weights
    )
