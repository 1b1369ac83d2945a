"""What answers have to be, by engines that nobody else asks.

In floating point an answer is known beforehand, token for token. Over 8-bit pages it depends on
what shares its steps and on where it was cut in two; there each token has to be as likely as the
worker said, after the prompt and the tokens before it.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Protocol

import msgspec
import torch

from fourfold.engine.engine import Engine
from fourfold.engine.messages import SamplingParams, Submit, TokenLogprob
from fourfold.gateway.detokenizer import Detokenizer
from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu import driving
from tests.cpu.chaos.questions import Question
from tests.cpu.chaos.served import Served

_CLEAR = 2e-3
"""By which the likeliest token leads, in logprob; closer, its lead could be one of rounding."""
_OTHERWISE = (1.0005, 1 / 1.0005)
"""Temperatures so little higher or lower change a sampled answer only where two tokens were as
close. One alone may move the border between two tokens away from what was drawn."""
_NUDGE = 1e-5
"""By which weights are changed, up for one temperature and down for the other: of two tokens as
good as equal at the edge of a nucleus, or two experts, one of both takes the other."""
_AT_ONCE = 64
_ROUNDING, _ROUNDING_OF_A_TOKEN = 0.1, 0.05
"""What log-probabilities of an answer over 8-bit pages may be off by in all: once, and for each of
its tokens. Without faults no token was off by more than 0.07; with other tokens in 64 places of a
prompt, each was by 0.7 in the median."""


@dataclasses.dataclass
class Heard:
    """One sample as its client heard it."""

    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finished: int = 0
    """How often its end was said."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """All that a client heard of one question; `whole` where its request was answered."""

    name: str
    question: Question
    samples: list[Heard]
    whole: bool


class Judge(Protocol):
    """Knows what answers have to be."""

    questions: list[Question]
    """Those that may be asked."""

    def complaints(self, answers: Sequence[Answer]) -> list[str]:
        """What is wrong with them."""
        ...

    def close(self) -> None: ...


class ExactJudge:
    """Knows every token. Questions whose answer hangs on the last bit are left out."""

    def __init__(self, served: Served, tokenizer: Tokenizer, drawn: Sequence[Question]) -> None:
        known = _known_answers(served, drawn)
        assert len(known) > len(drawn) // 2, "too many answers hang on the last bit"
        self._tokenizer, self._known = tokenizer, known
        self.questions = [question for question in drawn if question.number in known]

    def complaints(self, answers: Sequence[Answer]) -> list[str]:
        wrong = []
        for answer in answers:
            for index, heard in enumerate(answer.samples):
                tokens = self._known[answer.question.number][index]
                text = _text(self._tokenizer, tokens)
                if not answer.whole:
                    # What ended early may end in half a character, or before a token whose text
                    # was held.
                    tokens, text = tokens[: len(heard.tokens)], text[: len(heard.text)]
                if tuple(heard.tokens) != tokens or heard.text != text:
                    wrong.append(
                        f"{_where(answer, index)}: {heard.tokens} came, {list(tokens)} is right"
                    )
        return wrong

    def close(self) -> None:
        pass


class LikelyJudge:
    """Knows how likely every token is, once it has come."""

    def __init__(self, served: Served, tokenizer: Tokenizer, drawn: Sequence[Question]) -> None:
        self.questions, self._tokenizer = list(drawn), tokenizer
        # In a process of its own: what it grows by is not the gateway's.
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _begin_scoring, (served,)
        )
        self._pool.submit(_score, []).result()

    def complaints(self, answers: Sequence[Answer]) -> list[str]:
        said = [
            (answer, index, heard)
            for answer in answers
            for index, heard in enumerate(answer.samples)
        ]
        texts = [(*answer.question.prompt, *heard.tokens) for answer, _, heard in said]
        wrong = []
        scores = self._pool.submit(_score, texts).result()
        for (answer, index, heard), likely in zip(said, scores, strict=True):
            complaint = self._complaint(answer, heard, likely[len(answer.question.prompt) - 1 :])
            if complaint is not None:
                wrong.append(f"{_where(answer, index)}: {heard.tokens} came, {complaint}")
        return wrong

    def close(self) -> None:
        self._pool.shutdown()

    def _complaint(
        self, answer: Answer, heard: Heard, likely: Sequence[TokenLogprob]
    ) -> str | None:
        sampling, count = answer.question.sampling, len(heard.tokens)
        text = _text(self._tokenizer, heard.tokens)
        if count > sampling.max_tokens or (answer.whole and count < sampling.max_tokens):
            return f"{count} instead of {sampling.max_tokens}"
        if heard.text != (text if answer.whole else text[: len(heard.text)]):
            return f"with the text {heard.text!r} instead of {text!r}"
        most = _ROUNDING + _ROUNDING_OF_A_TOKEN * count
        off = [said - right.logprob for said, right in zip(heard.logprobs, likely, strict=True)]
        if not sum(map(abs, off)) <= most:
            return f"with log-probabilities that are off by {[round(each, 3) for each in off]}"
        behind = [right.top[0][1] - right.logprob for right in likely]
        if sampling.temperature == 0 and sum(behind) > most:
            return f"less likely than others by {[round(each, 3) for each in behind]}"
        return None


_scoring: Engine | None = None
"""Of the process that scores."""


def _begin_scoring(served: Served) -> None:
    global _scoring
    torch.set_num_threads(1)
    _scoring = served.make_engine(served.load(), running=8, prefix_cache=False)


def _score(texts: Sequence[tuple[int, ...]]) -> list[tuple[TokenLogprob, ...]]:
    """Log-probabilities of every token of a text but the first."""
    assert _scoring is not None
    asking = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=True)
    asked = [driving.submit(i, text, asking) for i, text in enumerate(texts)]
    news = driving.run(_scoring, asked)
    return [news[i, 0][0].prompt_logprobs or () for i in range(len(texts))]


def _where(answer: Answer, index: int) -> str:
    return f"{answer.name}, sample {index} of {answer.question.n}"


def _known_answers(
    served: Served, drawn: Sequence[Question]
) -> dict[int, tuple[tuple[int, ...], ...]]:
    """The tokens of every sample, by the numbers of those questions for which they are certain."""
    engine, *nudged = (_engine(served, nudge) for nudge in (0.0, _NUDGE, -_NUDGE))
    known = {}
    for start in range(0, len(drawn), _AT_ONCE):
        some = drawn[start : start + _AT_ONCE]
        answers = _answers(engine, some)
        others = [
            _answers(other, [_at(question, factor) for question in reversed(some)])[::-1]
            for other, factor in zip(nudged, _OTHERWISE, strict=True)
        ]
        for question, tokens, *again in zip(some, answers, *others, strict=True):
            if tokens is not None and all(tokens == each for each in again):
                known[question.number] = tokens
    return known


def _engine(served: Served, nudge: float) -> Engine:
    """An engine whose weights are larger or smaller by about this share, each by its own."""
    model = served.load()
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.mul_(1 + nudge * noise)
    return served.make_engine(model, running=32)


def _at(question: Question, factor: float) -> Question:
    """The question at another temperature."""
    sampling = question.sampling
    other = msgspec.structs.replace(sampling, temperature=sampling.temperature * factor)
    return msgspec.structs.replace(question, sampling=other)


def _answers(
    engine: Engine, questions: Sequence[Question]
) -> list[tuple[tuple[int, ...], ...] | None]:
    """Every sample's tokens; None where a greedy one was not clear."""
    news = driving.run(
        engine,
        [
            Submit(request_id=i, prompt_ids=q.prompt, sampling=q.sampling, n=q.n)
            for i, q in enumerate(questions)
        ],
    )
    answers: list[tuple[tuple[int, ...], ...] | None] = []
    for i, question in enumerate(questions):
        outputs = [news[i, index] for index in range(question.n)]
        clear = question.sampling.temperature > 0 or all(
            output.logprob.top[0][1] - output.logprob.top[1][1] > _CLEAR
            for each in outputs
            for output in each
            if output.logprob is not None
        )
        tokens = tuple(tuple(driving.tokens(each)) for each in outputs)
        answers.append(tokens if clear else None)
    return answers


def _text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()
