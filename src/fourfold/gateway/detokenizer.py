"""Tokens to text, one token at a time, never cutting a character."""

from __future__ import annotations

from fourfold.gateway.tokenizer import Tokenizer

# A UTF-8 character has at most four bytes, so a longer wait is for bytes that are not text.
_LONGEST_WAIT = 4


class Detokenizer:
    """Turns one sample's tokens into text as they come; special tokens have none.

    A token's text depends on the tokens before it, so each is decoded together with those of the
    piece before. Incomplete UTF-8 is held back until the token that completes it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0
        self._read = 0

    def push(self, token: int) -> str:
        """The text that is complete with this token; empty while a character is not."""
        self._ids.append(token)
        text = self._pending()
        if text.endswith("\ufffd") and len(self._ids) - self._read < _LONGEST_WAIT:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is left at the end; bytes that never became a character are U+FFFD."""
        return self._advance(self._pending())

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._before : self._read])
        return self._tokenizer.decode(self._ids[self._before :])[len(before) :]

    def _advance(self, text: str) -> str:
        # Only the last piece is ever needed again.
        self._ids = self._ids[self._read :]
        self._before, self._read = 0, len(self._ids)
        return text
