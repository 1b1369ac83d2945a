"""Tokens to text, one token at a time, never cutting a character."""

from __future__ import annotations

import codecs

from fourfold.gateway.tokenizer import Tokenizer


class Detokenizer:
    """Turns one sample's tokens into text as they come; special tokens have none.

    Works on the tokens' bytes, so that characters spread over tokens in any way come out whole, and
    the space that begins a word is kept whatever came before it. Bytes that are not UTF-8 become
    U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is complete with this token; empty while a character is not."""
        if self._tokenizer.is_special(token):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character."""
        return self._decoder.decode(b"", final=True)
