"""A fact hidden in a long text, and whether the model finds it again.

Somewhere in a piece of ordinary text stands a sentence with a random number; at its end the same
sentence begins once more, and the model has to go on with the number. Every token of the number
is predicted with the true ones before it, and it counts as found if each was the likeliest.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from fourfold.gateway.tokenizer import Tokenizer

_FACT = "\n\nThe secret number of the {name} library is {number}.\n\n"
_QUESTION = "\n\nThe secret number of the {name} library is"
_NAMES = ("Lisbon", "Cairo", "Oslo", "Quito", "Kyoto", "Dakar", "Turin", "Perth")


class Needle(NamedTuple):
    """A prompt whose last `answer` tokens are the number."""

    tokens: list[int]
    answer: int


def hide_needles(
    text_ids: list[int], tokenizer: Tokenizer, *, count: int, length: int
) -> list[Needle]:
    """So many prompts of `length` tokens, their facts evenly spread over the depth."""
    numbers = random.Random(0)
    needles = []
    for index in range(count):
        name, number = numbers.choice(_NAMES), numbers.randrange(10000, 100000)
        fact, question, whole = (
            tokenizer.encode(part, add_special_tokens=False)
            for part in (
                _FACT.format(name=name, number=number),
                _QUESTION.format(name=name),
                _QUESTION.format(name=name) + f" {number}",
            )
        )
        filler = length - len(fact) - len(whole)
        start = numbers.randrange(len(text_ids) - filler)
        depth = (2 * index + 1) * filler // (2 * count)
        before = text_ids[start : start + depth]
        after = text_ids[start + depth : start + filler]
        needles.append(Needle([*before, *fact, *after, *whole], len(whole) - len(question)))
    return needles
