"""What clients ask."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from fourfold.engine.messages import SamplingParams


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and how it is continued."""

    number: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    n: int


def draw_questions(rng: random.Random, count: int) -> list[Question]:
    """Some of them begin alike."""
    beginnings = [_words(rng, rng.choice((64, 100, 192))) for _ in range(8)]
    return [_draw(rng, beginnings, number) for number in range(count)]


def _draw(rng: random.Random, beginnings: Sequence[tuple[int, ...]], number: int) -> Question:
    length = rng.choice((rng.randint(2, 60), rng.randint(65, 200), rng.randint(200, 500)))
    prompt = _words(rng, length)
    if rng.random() < 0.3:
        prompt = rng.choice(beginnings) + prompt[: rng.randint(1, 150)]
    greedy = rng.random() < 0.5
    return Question(
        number=number,
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
