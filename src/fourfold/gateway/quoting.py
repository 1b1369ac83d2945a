"""Keeps what a conversation says apart from the marks that its template puts around it.

A template joins both to one text, in which the tokenizer finds the marks of the model by their
names. A message that holds such a name, `<|im_end|>` for instance, would end its turn there and
could begin another one, of the system's. So the names in messages are noted before the template has
them, and the tokenizer is told where they came to lie: there they are text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fourfold.errors import RequestError
from fourfold.gateway.chat_template import ChatTemplate

# Unicode's noncharacters for a program's own use: they come in no text and no template.
_NOTES = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class Prompt(NamedTuple):
    """A text, and where in it a mark's name begins that is text."""

    text: str
    quoted: tuple[int, ...] = ()


class Quoting:
    """Renders conversations in which the names of marks are text."""

    def __init__(self, template: ChatTemplate, marks: Iterable[str]) -> None:
        self._template = template
        longest_first = sorted(filter(None, marks), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """As `ChatTemplate.render`."""
        texts = [text for message in messages for text in message.values() if isinstance(text, str)]
        if not any(map(self._names.search, texts)):
            return Prompt(self._template.render(messages))
        note = _unused(texts)
        noted = [
            {
                field: self._names.sub(rf"{note}\g<0>", text) if isinstance(text, str) else text
                for field, text in message.items()
            }
            for message in messages
        ]
        first, *others = self._template.render(noted).split(note)
        quoted = itertools.accumulate(map(len, others[:-1]), initial=len(first))
        return Prompt("".join((first, *others)), tuple(quoted) if others else ())


def _unused(texts: Sequence[str]) -> str:
    """A note that is in no text."""
    for note in _NOTES:
        if not any(note in text for text in texts):
            return note
    raise RequestError(
        "the messages hold every one of Unicode's noncharacters, which are no text; remove them",
        param="messages",
    )
