"""Questions whose answers are known: those of one engine alone, in this process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.messages import SamplingParams, Submit
from fourfold.gateway.detokenizer import Detokenizer
from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu import driving

PAGES = 96
"""Of every engine, the oracle's included: few, so that they are evicted and fought for."""
ENGINE = EngineConfig(
    kv_memory_gib=PAGES * 2 * 3 * 2 * 64 * 16 * 4 / 2**30,
    max_running=8,
    step_tokens=128,
    decode_threads=1,
)
"""Of every worker. A page is keys and values of 3 layers, 2 heads and 64 tokens, 16 wide."""
_CLEAR = 2e-3
"""By which the likeliest token leads, in logprob; closer, its lead could be one of rounding."""
_OTHERWISE = (1.0005, 1 / 1.0005)
"""Temperatures so little higher or lower change a sampled answer only where two tokens were as
close. One alone may move the border between two tokens away from what was drawn."""
_NUDGE = 1e-5
"""By which weights are changed, up for one temperature and down for the other: of two tokens as
good as equal at the edge of a nucleus, or two experts, one of both takes the other."""
_AT_ONCE = 64


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, how it is continued, and what every sample of the answer must be."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    n: int
    tokens: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()


def make_questions(
    checkpoint: Path, tokenizer: Tokenizer, rng: random.Random, count: int, device: str
) -> list[Question]:
    """About so many questions. Those whose answer hangs on the last bit are left out."""
    engine, *nudged = (_engine(checkpoint, device, nudge) for nudge in (0.0, _NUDGE, -_NUDGE))
    beginnings = [_words(rng, rng.choice((64, 100, 192))) for _ in range(8)]
    drawn = [_draw(rng, beginnings) for _ in range(count)]
    questions = []
    for start in range(0, len(drawn), _AT_ONCE):
        some = drawn[start : start + _AT_ONCE]
        answers = _answers(engine, some)
        others = [
            _answers(other, [_at(question, factor) for question in reversed(some)])[::-1]
            for other, factor in zip(nudged, _OTHERWISE, strict=True)
        ]
        for question, tokens, *again in zip(some, answers, *others, strict=True):
            if tokens is not None and all(tokens == each for each in again):
                texts = tuple(_text(tokenizer, each) for each in tokens)
                questions.append(msgspec.structs.replace(question, tokens=tokens, texts=texts))
    assert len(questions) > count // 2, "too many answers hang on the last bit"
    return questions


def _engine(checkpoint: Path, device: str, nudge: float) -> driving.Engine:
    """An engine whose weights are larger or smaller by about this share, each by its own."""
    model = driving.load_tiny(checkpoint, device)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.mul_(1 + nudge * noise)
    return driving.make_engine(model, pages=2 * PAGES, max_running=32)


def _draw(rng: random.Random, beginnings: Sequence[tuple[int, ...]]) -> Question:
    length = rng.choice((rng.randint(2, 60), rng.randint(65, 200), rng.randint(200, 500)))
    prompt = _words(rng, length)
    if rng.random() < 0.3:
        prompt = rng.choice(beginnings) + prompt[: rng.randint(1, 150)]
    greedy = rng.random() < 0.5
    return Question(
        prompt=prompt,
        n=1 if rng.random() < 0.75 else rng.randint(2, 4),
        sampling=SamplingParams(
            temperature=0.0 if greedy else rng.choice((0.6, 1.0, 1.4)),
            top_p=1.0 if greedy else rng.choice((0.9, 1.0)),
            seed=rng.getrandbits(40),
            logprobs=2,
            max_tokens=rng.choice((1, 2, 8, 20, 40, 40, 120)),
        ),
    )


def _words(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randint(3, 319) for _ in range(length))


def _at(question: Question, factor: float) -> Question:
    """The question at another temperature."""
    sampling = question.sampling
    other = msgspec.structs.replace(sampling, temperature=sampling.temperature * factor)
    return msgspec.structs.replace(question, sampling=other)


def _answers(
    engine: driving.Engine, questions: Sequence[Question]
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
