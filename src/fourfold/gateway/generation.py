"""One admitted request as its caller sees it: a stream of deltas that ends exactly once.

Text here is exact: a stop string never appears in it, not even in part, and a token's text is
only sent once it is complete UTF-8.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from fourfold.engine.messages import (
    Abort,
    FinishReason,
    SamplingParams,
    Submit,
    TokenLogprob,
    TokenOutput,
)
from fourfold.errors import DeadlineError, FourfoldError, RequestFailedError
from fourfold.gateway.detokenizer import Detokenizer
from fourfold.gateway.stop_strings import StopStrings
from fourfold.gateway.tokenizer import Tokenizer


class GenerationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks of a prompt, already validated as to types; the gateway checks budgets.

    `sampling.stop_token_ids` are the caller's own; the gateway adds the model's end-of-text ids
    unless `ignore_eos`. `max_tokens` None means as many as context and limits allow; what
    `sampling` has of it is not read.
    """

    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    up_to: int | None = None
    """Where `max_tokens` is None: this many, or fewer where context and limits leave fewer."""
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


class TokenText(msgspec.Struct, frozen=True):
    """A token as text, with its log-probability where logprobs were asked for.

    `text` holds U+FFFD where the token's bytes alone are not UTF-8; `data` are the exact bytes.
    """

    text: str
    data: bytes
    token: int
    logprob: float | None = None
    top: tuple[TokenText, ...] = ()
    special: bool = False
    """Whether it is a mark of the model's; an answer's text shows none of it."""


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """News of one sample: new text (perhaps none yet), its tokens if logprobs were asked for, and
    at the end the reason."""

    index: int
    text: str = ""
    tokens: tuple[TokenText, ...] = ()
    finish: FinishReason | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one generation so far, over all its samples."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclasses.dataclass
class _Sample:
    """One sample's text under way. `held` are tokens whose text is not yet certain to be output,
    each with the place in the text where it begins."""

    detokenizer: Detokenizer
    stops: StopStrings
    token_ids: list[int] = dataclasses.field(default_factory=list)
    made: int = 0
    passed: int = 0
    held: list[tuple[int, TokenText]] = dataclasses.field(default_factory=list)
    finish: FinishReason | None = None


class Generation:
    """An admitted request. Iterate it once, or `listen` and `take`; leaving early must be followed
    by `cancel()`.

    Iterating yields `Delta`s of all samples interleaved and stops after every sample has finished.
    It raises `RequestFailedError` or `DeadlineError` when the request could not be finished, and
    `DrainingError` when the server shut down before it was.
    """

    def __init__(
        self,
        request: Submit,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str],
        prompt_text: str | None,
        abort: Callable[[Abort], None],
        on_end: Callable[[int], None],
    ) -> None:
        self.request_id = request.request_id
        self._request = request
        self._stop_token_ids = frozenset(request.sampling.stop_token_ids)
        self._tokenizer = tokenizer
        self._prompt_text = prompt_text
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._prompt_tokens: tuple[TokenText, ...] = ()
        """Kept once they were asked for: every choice that repeats the prompt wants them."""
        self._abort = abort
        self._on_end = on_end
        self._samples = [
            _Sample(Detokenizer(tokenizer), StopStrings(stop)) for _ in range(request.n)
        ]
        self._news: list[Delta] = []
        self._failure: FourfoldError | None = None
        self._on_news: Callable[[], None] = lambda: None
        self._cached_tokens = 0
        self._ended = False
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def prompt_text(self) -> str:
        """The prompt as text, for `echo`."""
        if self._prompt_text is None:
            ids = list(self._request.prompt_ids)
            self._prompt_text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return self._prompt_text

    @property
    def prompt_tokens(self) -> tuple[TokenText, ...]:
        """The prompt's tokens; with log-probabilities, for all but the first, after the first
        delta of a request with `sampling.prompt_logprobs`."""
        if not self._prompt_tokens:
            first, *others = self._request.prompt_ids
            if self._prompt_logprobs:
                texts = [self._token_text(entry) for entry in self._prompt_logprobs]
            else:
                texts = [self._plain(token) for token in others]
            self._prompt_tokens = (self._plain(first), *texts)
        return self._prompt_tokens

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self._request.prompt_ids),
            cached_tokens=self._cached_tokens,
            completion_tokens=sum(len(sample.token_ids) for sample in self._samples),
        )

    def token_ids(self, index: int) -> tuple[int, ...]:
        """What a sample's text was made of so far, tokens that end it included."""
        return tuple(self._samples[index].token_ids)

    def listen(self, on_news: Callable[[], None]) -> None:
        """Has `on_news` called on the loop whenever there is something to `take`."""
        self._on_news = on_news
        if self._news or self._failure is not None:
            on_news()

    def take(self) -> tuple[list[Delta], FourfoldError | None]:
        """The news since the last call, and why there will be no more if the request failed."""
        news, self._news = self._news, []
        return news, self._failure

    async def __aiter__(self) -> AsyncIterator[Delta]:
        arrived = asyncio.Event()
        self.listen(arrived.set)
        unfinished = len(self._samples)
        while unfinished:
            await arrived.wait()
            arrived.clear()
            news, failure = self.take()
            for delta in news:
                unfinished -= delta.finish is not None
                yield delta
            if failure is not None:
                raise failure

    def cancel(self, reason: FourfoldError | None = None) -> None:
        """Ends whatever still runs and frees its pages; harmless after the end. Whoever iterates
        is told `reason`."""
        self._end_early(reason or RequestFailedError("the request was cancelled"))

    def expire_after(self, seconds: float) -> None:
        """Ends the request with a `DeadlineError` unless it ends before; inf means never."""
        if math.isinf(seconds):
            return
        self._deadline = asyncio.get_running_loop().call_later(
            seconds,
            self._end_early,
            DeadlineError(f"the request did not finish within {seconds:g} seconds"),
        )

    def receive(self, output: TokenOutput) -> None:
        """Takes in the engine's news of one sample."""
        sample = self._samples[output.index]
        if self._ended or sample.finish is not None:
            return
        if output.finish is FinishReason.FAILED:
            self._end_early(RequestFailedError(f"the engine failed: {output.error}"))
            return
        if output.prompt_logprobs is not None:
            self._prompt_logprobs, self._prompt_tokens = output.prompt_logprobs, ()
        if output.index == 0:  # the others find what the first has just computed
            self._cached_tokens += output.cached_tokens
        delta = self._advance(sample, output)
        if delta.text or delta.tokens or delta.finish:
            self._news.append(delta)
            self._on_news()
        if all(sample.finish is not None for sample in self._samples):
            self._end()

    def _advance(self, sample: _Sample, output: TokenOutput) -> Delta:
        text, stopped = "", False
        begins = sample.made
        if output.token is not None:
            sample.token_ids.append(output.token)
            ends_sample = output.token in self._stop_token_ids
            piece = "" if ends_sample else sample.detokenizer.push(output.token)
            sample.made += len(piece)
            text, stopped = sample.stops.push(piece)
        if output.finish is not None and not stopped:
            rest, stopped = sample.stops.push(sample.detokenizer.flush())
            text += rest + ("" if stopped else sample.stops.flush())
        sample.passed += len(text)
        if output.logprob is not None and output.token is not None:
            sample.held.append((begins, self._token_text(output.logprob)))
        if stopped:
            sample.finish = FinishReason.STOP
            if output.finish is None:
                self._abort(
                    Abort(request_id=self.request_id, index=output.index, reason=FinishReason.STOP)
                )
        else:
            sample.finish = output.finish
        everything = sample.finish is not None and not stopped
        certain = [t for place, t in sample.held if everything or place < sample.passed]
        sample.held = sample.held[len(certain) :]
        return Delta(index=output.index, text=text, tokens=tuple(certain), finish=sample.finish)

    def _end_early(self, error: FourfoldError) -> None:
        if not self._ended:
            self._abort(Abort(request_id=self.request_id))
            self._failure = error
            self._on_news()
            self._end()

    def _end(self) -> None:
        self._ended = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._on_end(self.request_id)

    def _token_text(self, entry: TokenLogprob) -> TokenText:
        top = tuple(self._plain(token, logprob) for token, logprob in entry.top)
        return msgspec.structs.replace(self._plain(entry.token, entry.logprob), top=top)

    def _plain(self, token: int, logprob: float | None = None) -> TokenText:
        data = self._tokenizer.token_bytes(token)
        return TokenText(
            text=data.decode(errors="replace"),
            data=data,
            token=token,
            logprob=logprob,
            special=self._tokenizer.is_special(token),
        )
