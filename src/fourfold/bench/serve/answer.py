"""One streamed answer, timed as it arrives.

What counts as the first token is the first event that carries text: the empty "assistant" delta
some chat servers send at once is no token, however early. The last token is the last event with
text or with the finish reason, since a token without text (an end-of-text, half a character) may
show only there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import msgspec

from fourfold.bench.serve.sse import EventParser


class Usage(msgspec.Struct, frozen=True):
    """The server's own token counts."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """An OpenAI error body, as far as it is one."""

    message: str = ""


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def has_text(self) -> bool:
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls)


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: ErrorBody | str | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError)
"""What decoding raises; the second for a string that is not UTF-8, such as half a character."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request gave no full answer: a `kind` to count by, and what the server said of it."""

    kind: str
    detail: str


class Answer:
    """Takes the body of one response piece by piece; never raises, but ends in a `failure`.

    Times are `time.perf_counter()` seconds. `first` and `last` are None until there is a token.
    """

    def __init__(self) -> None:
        self.usage = Usage()
        self.failure: Failure | None = None
        self.text_times: list[float] = []
        self._last: float | None = None
        self._complete = False
        self._refusal = b""
        self._events = EventParser()

    @property
    def first(self) -> float | None:
        """When the first token arrived."""
        return self.text_times[0] if self.text_times else self._last

    @property
    def last(self) -> float | None:
        """When the last token arrived."""
        return self._last

    @property
    def gaps(self) -> tuple[float, ...]:
        """Seconds between one event with text and the next (ITL)."""
        return tuple(after - before for before, after in pairwise(self.text_times))

    def feed(self, status: int, piece: bytes, at: float) -> None:
        """A piece of the body that arrived at `at`."""
        if status != 200:
            self._refusal += piece
            return
        for event in self._events.feed(piece, at):
            if self.failure is None and not self._complete:
                self._take(event.data, event.at)

    def close(self, status: int) -> None:
        """Says that the body is over; decides whether it was an answer."""
        if self.failure is not None:
            return
        if status != 200:
            self.failure = Failure(f"http {status}", error_message(self._refusal))
        elif not self._complete:
            rest = self._events.pending[:80].decode(errors="replace")
            self.failure = Failure("malformed", f"the stream ended without [DONE] {rest}".strip())
        elif self._last is None:
            self.failure = Failure("malformed", "the stream held no token and no finish_reason")

    def _take(self, data: bytes, at: float) -> None:
        if data == b"[DONE]":
            self._complete = True
            return
        try:
            chunk = _CHUNK.decode(data)
        except NOT_JSON as error:
            quoted = data[:80].decode(errors="replace")
            self.failure = Failure("malformed", f"{error}: {quoted}")
            return
        if chunk.error is not None:
            self.failure = Failure("stream error", error_message(data))
            return
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            if choice.has_text():
                self.text_times.append(at)
                self._last = at
            elif choice.finish_reason is not None:
                self._last = at


def error_message(body: bytes) -> str:
    """What an error body says: its OpenAI message where it has one, else its first characters."""
    try:
        error = _CHUNK.decode(body).error
    except NOT_JSON:
        error = None
    if isinstance(error, ErrorBody) and error.message:
        return error.message
    return error if isinstance(error, str) else body[:200].decode(errors="replace")
