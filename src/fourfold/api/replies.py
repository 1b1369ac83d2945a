"""What the two APIs answer with: the structs on the wire, and the filling of them from deltas.

msgspec structs rather than pydantic models, because we made their contents ourselves and a stream
encodes one for every few tokens. Each API is a `Reply`, which is fed the deltas of one request
in order, either as they come (`events`) or all at once (`whole`).
"""

from __future__ import annotations

import codecs
import math
import time
import uuid
from collections.abc import Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from fourfold.gateway.generation import Delta, Generation, TokenText
from fourfold.gateway.generation import Usage as Counts

DONE = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON cannot write."""

_encode = msgspec.json.Encoder().encode


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those that were not computed again."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    """One likely token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """The chosen token, with the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities as the chat API has them."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """A whole answer."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One sample, whole."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(msgspec.Struct, frozen=True):
    """The news in a chunk; absent fields have none."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """News of one sample."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a streamed chat answer."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities as the older API has them: four lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One sample, whole or in part."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /v1/completions, whole or one event of it."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class Reply(Protocol):
    """One request's answer in the making."""

    def detailed(self, deltas: Sequence[Delta]) -> int:
        """How many tokens' log-probabilities telling these deltas takes: all but nothing else takes
        time."""

    def events(self, delta: Delta, counts: Counts | None) -> bytes:
        """The server-sent events that tell `delta`, each with the request's token counts so far
        where they are given; empty when it holds no news."""

    def usage_event(self, counts: Counts) -> bytes:
        """The event that ends a stream with its token counts."""

    def whole(self, deltas: Sequence[Delta], counts: Counts) -> bytes:
        """The JSON body, given one complete delta for each choice."""


class ChatReply:
    """Answers in the form of /v1/chat/completions."""

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool) -> None:
        self._model = model
        self._logprobs = logprobs
        self._usage: UnsetType | None = None if include_usage else UNSET
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._begun: set[int] = set()

    def detailed(self, deltas: Sequence[Delta]) -> int:
        """See `Reply`."""
        return sum(len(delta.tokens) for delta in deltas) if self._logprobs else 0

    def events(self, delta: Delta, counts: Counts | None) -> bytes:
        """See `Reply`. A choice's first event names its role, its last has the finish reason."""
        usage = self._usage if counts is None else _usage(counts)
        news = b""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            role = ChatDelta(role="assistant", content="")
            news = self._event(ChatChunkChoice(delta.index, role), usage)
        if delta.text or (self._logprobs and delta.tokens):
            logprobs = self._token_logprobs(delta)
            content = ChatDelta(content=delta.text)
            news += self._event(ChatChunkChoice(delta.index, content, logprobs), usage)
        if delta.finish is not None:
            last = ChatChunkChoice(delta.index, ChatDelta(), finish_reason=_reason(delta))
            news += self._event(last, usage)
        return news

    def usage_event(self, counts: Counts) -> bytes:
        """See `Reply`."""
        return _event(self._chunk([], _usage(counts)))

    def whole(self, deltas: Sequence[Delta], counts: Counts) -> bytes:
        """See `Reply`."""
        choices = [
            ChatChoice(
                delta.index, ChatMessage(delta.text), self._token_logprobs(delta), _reason(delta)
            )
            for delta in deltas
        ]
        return _encode(
            ChatCompletion(
                id=self._id,
                created=self._created,
                model=self._model,
                choices=choices,
                usage=_usage(counts),
            )
        )

    def _event(self, choice: ChatChunkChoice, usage: Usage | UnsetType | None) -> bytes:
        return _event(self._chunk([choice], usage))

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _token_logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs([_chat_logprob(token) for token in delta.tokens])


class CompletionReply:
    """Answers in the form of /v1/completions."""

    def __init__(
        self,
        model: str,
        *,
        logprobs: bool,
        include_usage: bool,
        echo: Sequence[Generation] = (),
        n: int = 1,
    ) -> None:
        """`echo` are the generations of which each repeats its prompt before its `n` samples."""
        self._model = model
        self._logprobs = logprobs
        self._usage: UnsetType | None = None if include_usage else UNSET
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._echo = echo
        self._n = n
        self._offsets: dict[int, _Offsets] = {}

    def detailed(self, deltas: Sequence[Delta]) -> int:
        """See `Reply`."""
        if not self._logprobs:
            return 0
        begun = {delta.index for delta in deltas if delta.index not in self._offsets}
        echoed = [self._echo[index // self._n].usage for index in begun] if self._echo else []
        told = sum(usage.prompt_tokens for usage in echoed)
        return told + sum(len(delta.tokens) for delta in deltas)

    def events(self, delta: Delta, counts: Counts | None) -> bytes:
        """See `Reply`. An echoed prompt comes with its choice's first event."""
        choice = self._choice(delta)
        news = choice.text or choice.finish_reason or (choice.logprobs and choice.logprobs.tokens)
        usage = self._usage if counts is None else _usage(counts)
        return _event(self._completion([choice], usage)) if news else b""

    def usage_event(self, counts: Counts) -> bytes:
        """See `Reply`."""
        return _event(self._completion([], _usage(counts)))

    def whole(self, deltas: Sequence[Delta], counts: Counts) -> bytes:
        """See `Reply`."""
        choices = [self._choice(delta) for delta in deltas]
        return _encode(self._completion(choices, _usage(counts)))

    def _choice(self, delta: Delta) -> CompletionChoice:
        text, tokens = delta.text, delta.tokens
        offsets = self._offsets.get(delta.index)
        if offsets is None:
            prompt = self._echo[delta.index // self._n] if self._echo else None
            echoed = "" if prompt is None else prompt.prompt_text
            offsets = self._offsets[delta.index] = _Offsets(echoed)
            if prompt is not None:
                text = echoed + text
                tokens = (prompt.prompt_tokens + tokens) if self._logprobs else tokens
        logprobs = _completion_logprobs(tokens, offsets) if self._logprobs else None
        finish = None if delta.finish is None else _reason(delta)
        return CompletionChoice(delta.index, text, logprobs, finish)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        return Completion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )


class _Offsets:
    """Counts the characters that the tokens so far have completed in a choice's text, which may
    begin with an echoed prompt."""

    def __init__(self, echoed: str) -> None:
        self._echoed = echoed
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, token: TokenText) -> int:
        start = self._length
        # A prompt shows the marks that its caller wrote, not those put around it.
        if not token.special or self._echoed.startswith(token.text, start):
            shown = self._decoder.decode(token.data)
            # SentencePiece puts a space before a text.
            added = not start and shown[:1] == " " and self._echoed[:1] not in ("", " ")
            self._length += len(shown) - added
        return start


def _completion_logprobs(tokens: Sequence[TokenText], offsets: _Offsets) -> CompletionLogprobs:
    top: list[dict[str, float] | None] = []
    for token in tokens:
        # The chosen token is always among them, so there may be one more than was asked for.
        likely = {_exact_text(other): _finite(other.logprob) for other in token.top}
        chosen = {_exact_text(token): _finite(token.logprob)}
        top.append(None if token.logprob is None else likely | chosen)
    return CompletionLogprobs(
        tokens=[_exact_text(token) for token in tokens],
        token_logprobs=[
            None if token.logprob is None else _finite(token.logprob) for token in tokens
        ],
        top_logprobs=top,
        text_offset=[offsets.next(token) for token in tokens],
    )


def _chat_logprob(token: TokenText) -> TokenLogprob:
    top = [TopLogprob(other.text, _finite(other.logprob), list(other.data)) for other in token.top]
    return TokenLogprob(token.text, _finite(token.logprob), list(token.data), top)


def _exact_text(token: TokenText) -> str:
    """A token that is not UTF-8 by itself as OpenAI writes it, so that no two look the same."""
    if "\ufffd" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _finite(logprob: float | None) -> float:
    if logprob is None or math.isnan(logprob):
        return _LEAST_LOGPROB
    return max(logprob, _LEAST_LOGPROB)


def _reason(delta: Delta) -> str:
    assert delta.finish is not None
    return delta.finish.value


def _usage(counts: Counts) -> Usage:
    return Usage(
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        total_tokens=counts.prompt_tokens + counts.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(counts.cached_tokens),
    )


def _event(chunk: ChatChunk | Completion) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
