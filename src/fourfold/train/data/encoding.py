"""Texts to ids. A text is text throughout: where it has the words of a special token, such as the
mark for the end of a text, it gets the ids of their characters, never that token's own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

from tokenizers import AddedToken, Tokenizer

from fourfold.train.data.bpe import fingerprint
from fourfold.train.data.shards import Vocabulary

_LONGEST_PIECE = 1 << 20
"""Characters that are encoded together; a longer document is cut, if possible at a line's end."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tokenizer and the mark that it has for the end of a text."""

    name: str
    backend: Tokenizer
    end_of_text: str | None

    def vocabulary(self) -> Vocabulary:
        end = None if self.end_of_text is None else self.backend.token_to_id(self.end_of_text)
        return Vocabulary(
            name=self.name,
            tokens=self.backend.get_vocab_size(),
            sha256=fingerprint(self.backend),
            end_of_text=end,
        )


class PlainText:
    """Encodes texts in which nothing is a special token."""

    def __init__(self, encoder: Encoder) -> None:
        self._backend = Tokenizer.from_str(encoder.backend.to_str())
        if encoder.end_of_text is not None:
            # Not every tokenizer says of it that it is special.
            mark = AddedToken(encoder.end_of_text, special=True, normalized=False)
            self._backend.add_special_tokens([mark])
        self._backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        words = {id_: token.content for id_, token in added.items() if token.special}
        # Models that look whole words up find these too, but not where they are cut.
        found = [re.escape(word) for id_, word in words.items() if id_ in self._ids(word)]
        self._found = re.compile("|".join(found)) if found else None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Ids of each text."""
        pieces = [list(self._pieces(text)) for text in texts]
        encodings = iter(
            self._backend.encode_batch_fast(
                list(itertools.chain(*pieces)), add_special_tokens=False
            )
        )
        for own in pieces:
            encoded = itertools.islice(encodings, len(own))
            yield list(itertools.chain.from_iterable(encoding.ids for encoding in encoded))

    def _pieces(self, text: str) -> Iterator[str]:
        for piece in pieces_of(text):
            begin = 0
            for match in self._found.finditer(piece) if self._found else ():
                end = match.start() + 1
                yield piece[begin:end]
                begin = end
            yield piece[begin:]


def pieces_of(text: str) -> Iterator[str]:
    """The parts of a text that are encoded together."""
    begin = 0
    while len(text) - begin > _LONGEST_PIECE:
        line_end = text.rfind("\n", begin, begin + _LONGEST_PIECE) + 1
        end = line_end if line_end > begin else begin + _LONGEST_PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]
