"""Text that comes token by token is the text of all tokens together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fourfold.gateway.detokenizer import Detokenizer
from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu.gateway import made_tokenizers
from tests.cpu.models import default_model

TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from("aZ 0\n\t'é中文漢字مहि😀👩‍🚀🏽\u200d\ufeff"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=12,
)


@functools.cache
def made(kind: str) -> Tokenizer:
    if kind == "default":
        return default_model.tokenizer()
    backend = getattr(made_tokenizers, kind)()
    with TemporaryDirectory() as folder:
        return made_tokenizers.load(made_tokenizers.write(Path(folder), backend))


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@functools.cache
def token_of_byte(kind: str) -> dict[int, int]:
    """The token of every single byte."""
    tokenizer = made(kind)
    tokens = {
        tokenizer.token_bytes(token): token for token in range(tokenizer.backend.get_vocab_size())
    }
    if kind == "byte_fallback":
        first = tokenizer.backend.token_to_id("<0x00>")
        return {byte: first + byte for byte in range(256)}
    return {byte: tokens[bytes([byte])] for byte in range(256) if bytes([byte]) in tokens}


@pytest.mark.parametrize("kind", ["default", "byte_level"])
@settings(deadline=None)
@given(data=st.data())
def test_any_tokens_also_those_that_are_no_text(kind: str, data: st.DataObject) -> None:
    tokenizer = made(kind)
    any_token = st.integers(0, tokenizer.backend.get_vocab_size() - 1)
    byte_token = st.sampled_from(sorted(token_of_byte(kind).values()))
    special = st.sampled_from(sorted(tokenizer.backend.get_added_tokens_decoder()))
    ids = data.draw(st.lists(st.one_of(any_token, byte_token, special), max_size=16))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def decode_within_a_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What the tokens add to a text before them: SentencePiece drops a text's first space only."""
    before = [tokenizer.backend.token_to_id("\u2581world")]
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


@settings(deadline=None)
@given(data=st.data())
def test_any_words_of_a_sentencepiece_model(data: st.DataObject) -> None:
    """Bytes that are no text aside: one of them spoils the whole run in `decode`."""
    tokenizer = made("byte_fallback")
    word = st.integers(259, tokenizer.backend.get_vocab_size() - 1).map(lambda token: [token])
    character = st.characters(exclude_categories=["Cs"]).map(
        lambda text: [token_of_byte("byte_fallback")[byte] for byte in text.encode()]
    )
    words = data.draw(st.lists(st.one_of(word, character), max_size=10))
    ids = [token for word in words for token in word]
    assert "".join(pieces(tokenizer, ids)) == decode_within_a_text(tokenizer, ids)


@pytest.mark.parametrize("kind", ["default", "byte_level", "byte_fallback"])
@settings(deadline=None)
@given(text=TEXTS)
@example(text="a👩\u200d🚀b🏽")
def test_valid_text_in_single_bytes_never_shows_a_replacement(kind: str, text: str) -> None:
    """The worst cutting there is: one token for each byte."""
    tokens = token_of_byte(kind)
    assume("\ufffd" not in text and all(byte in tokens for byte in text.encode()))
    assume(kind != "byte_fallback" or not text.startswith(" "))  # its decoder drops one
    got = pieces(made(kind), [tokens[byte] for byte in text.encode()])
    assert "".join(got) == text


@settings(deadline=None)
@given(text=TEXTS)
def test_text_as_the_default_model_would_write_it(text: str) -> None:
    assume(all(byte in token_of_byte("default") for byte in text.encode()))
    tokenizer = made("default")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) == text


def test_a_character_after_bytes_that_are_no_text() -> None:
    tokens = token_of_byte("default")
    ids = [tokens[byte] for byte in b"\x80\x80\x80\xc3\xa9!"]
    assert "".join(pieces(made("default"), ids)) == "\ufffd\ufffd\ufffdé!"


@pytest.mark.parametrize("token", ["<|im_start|>", "<|endoftext|>"])
def test_special_tokens_have_no_text_and_do_not_break_characters(token: str) -> None:
    tokenizer = made("default")
    special = tokenizer.backend.token_to_id(token)
    first, *others = (token_of_byte("default")[byte] for byte in "é".encode())
    assert "".join(pieces(tokenizer, [special, first, special, *others, special])) == "é"


def test_a_character_comes_with_the_token_that_completes_it() -> None:
    tokens = token_of_byte("default")
    ids = [tokens[byte] for byte in "a😀b".encode()]
    assert pieces(made("default"), ids) == ["a", "", "", "", "😀", "b", ""]


def test_tokens_that_end_one_character_and_begin_the_next() -> None:
    """Hiragana whose every token but the first and last holds parts of two characters."""
    text = "ああああああああ"  # each is E3 81 82
    tokenizer = made("byte_level")
    by_bytes = {
        tokenizer.token_bytes(token): token for token in range(tokenizer.backend.get_vocab_size())
    }
    begin, middle, across, end = (
        by_bytes[data] for data in (b"\xe3", b"\x81", b"\x82\xe3", b"\x82")
    )
    ids = [begin, middle, *[across, middle] * (len(text) - 1), end]
    assert tokenizer.decode(ids) == text
    got = pieces(tokenizer, ids)
    assert "".join(got) == text
    assert max(map(len, got)) == 1, "every character comes as soon as it is complete"


def test_invalid_bytes_are_not_waited_for_forever() -> None:
    tokenizer = made("byte_level")
    [bad] = [
        t for t in range(tokenizer.backend.get_vocab_size()) if tokenizer.token_bytes(t) == b"\xff"
    ]
    got = pieces(tokenizer, [bad] * 40)
    assert "".join(got) == "\ufffd" * 40
    assert sum(map(bool, got[:20])) >= 3


def test_a_space_after_a_special_token_is_kept() -> None:
    tokenizer = made("byte_fallback")
    ids = [tokenizer.backend.token_to_id(piece) for piece in ("▁world", "▁world", "</s>", "▁world")]
    assert "".join(pieces(tokenizer, ids)) == decode_within_a_text(tokenizer, ids)
