"""`fourfold tokenize`: shards hold what the tokenizer gives, and a killed run loses nothing."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import AddedToken, Tokenizer, models

from fourfold.cli.main import run
from fourfold.errors import ConfigError
from fourfold.train.data import encoding, tokenizing
from fourfold.train.data.config import TokenizeConfig
from fourfold.train.data.documents import find_inputs
from fourfold.train.data.encoding import Encoder, PlainText
from fourfold.train.data.shards import IdType, Shards
from fourfold.train.data.tokenizing import is_held_out, tokenize

WORDS = "the expert that a token chose was never the one it wanted; naïve tokens, alas".split()  # noqa: SIM905


def text_of(number: int) -> str:
    words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(20 + number % 30)]
    return f"{number}: " + " ".join(words)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with every kind of file, and its documents in order."""
    folder = tmp_path / "texts"
    folder.mkdir()
    known = [text_of(number) for number in range(120)]
    (folder / "a.txt").write_text(known[0])
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n\n" for i, t in enumerate(known[1:50]))
    (folder / "b.jsonl").write_text(lines)
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in known[50:80])
    table = pyarrow.table({"text": known[80:], "other": list(range(40))})
    pyarrow.parquet.write_table(table, folder / "d.parquet")
    (folder / "e.png").write_bytes(b"\x89PNG")
    return folder, known


def options(folder: Path, **fields: Any) -> TokenizeConfig:
    return TokenizeConfig(
        **{
            "inputs": (folder,),
            "out": folder.parent / "shards",
            "train_bpe": 300,
            "held_out": 0.2,
            "shard_tokens": 600,
        }
        | fields
    )


def contents(out: Path) -> dict[str, bytes]:
    """Every file but the state of the work."""
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(p.relative_to(out)): p.read_bytes() for p in files if p.name != "progress.json"}


def test_shards_hold_the_documents_in_order(texts: tuple[Path, list[str]]) -> None:
    folder, known = texts
    metas = tokenize(options(folder), None)
    backend = Tokenizer.from_file(str(folder.parent / "shards/tokenizer/tokenizer.json"))
    end = backend.token_to_id("<|endoftext|>")
    for split in ("train", "held-out"):
        shards = Shards(folder.parent / "shards" / split)
        mine = [t for t in known if is_held_out(t.encode(), 0.2) == (split == "held-out")]
        assert len(mine) == shards.meta.documents > 0
        for number, text in enumerate(mine):
            ids = shards.document(number).tolist()
            assert ids.pop() == end
            assert backend.decode(ids) == text
        assert shards.meta == metas[split]
        assert shards.meta.text_bytes == sum(len(t.encode()) for t in mine)
        assert shards.meta.dtype == IdType.UINT16
        assert all(shard.tokens < 600 + 200 for shard in shards.meta.shards)
    assert len(metas["train"].shards) > 3


@pytest.mark.parametrize("moment", [1, 4])
@pytest.mark.parametrize("when", ["before the state", "between states"])
def test_a_killed_run_is_continued_to_the_same_shards(
    texts: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
    when: str,
) -> None:
    folder, _ = texts
    monkeypatch.setattr(tokenizing, "_SAVED_EVERY", 1500)
    monkeypatch.setattr(tokenizing, "_DOCUMENTS_AT_ONCE", 4)
    tokenize(options(folder, out=folder.parent / "whole"), None)
    killed = options(folder)
    left = moment

    def counting(inner: Callable[..., None]) -> Callable[..., None]:
        def go(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                raise KeyboardInterrupt
            inner(*arguments)

        return go

    with monkeypatch.context() as patch:
        if when == "before the state":  # the shards are ahead of what is known of them
            patch.setattr(tokenizing, "_write_state", counting(tokenizing._write_state))
            progress: tokenizing.Progress = lambda done, total: None  # noqa: E731
        else:
            left = 4 * moment
            progress = counting(lambda done, total: None)
        with pytest.raises(KeyboardInterrupt):
            tokenize(killed, None, progress)
    assert not (killed.out / "train" / "meta.json").exists()
    with pytest.raises(ConfigError, match="no finished shards"):
        Shards(killed.out / "train")
    read: list[int] = []
    tokenize(killed, None, lambda done, total: read.append(done))
    assert contents(killed.out) == contents(folder.parent / "whole")
    tokenize(killed, None, lambda done, total: pytest.fail("done work was done again"))


def test_other_work_is_not_continued(texts: tuple[Path, list[str]]) -> None:
    folder, _ = texts
    tokenize(options(folder), None)
    (folder / "f.txt").write_text("one more")
    with pytest.raises(ConfigError, match="begun from other texts"):
        tokenize(options(folder), None)


def test_a_text_edited_to_the_same_length_is_other_work(texts: tuple[Path, list[str]]) -> None:
    folder, known = texts
    tokenize(options(folder), None)
    (folder / "a.txt").write_text(known[0].swapcase())
    later = (folder / "b.jsonl").stat().st_mtime_ns + 10**9  # whatever a clock's steps are
    os.utime(folder / "a.txt", ns=(later, later))
    with pytest.raises(ConfigError, match="have changed since"):
        tokenize(options(folder), None)


def test_the_same_folder_by_another_path_is_the_same_work(
    texts: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = texts
    metas = tokenize(options(folder), None)
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for path in (Path(), Path("../texts"), folder.parent / "link"):
        assert tokenize(options(folder, inputs=(path,)), None) == metas


def test_a_file_named_twice_is_read_once_under_its_own_name(
    texts: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link's target may have no ending that says what it is."""
    folder, _ = texts
    (folder / "b.jsonl").rename(folder.parent / "blob")
    (folder / "b.jsonl").symlink_to(folder.parent / "blob")
    monkeypatch.chdir(folder)
    found = find_inputs((Path("b.jsonl"), folder / "b.jsonl", Path("../texts")))
    assert [path.name for path in found] == ["a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet"]


def test_long_texts_are_encoded_in_pieces(
    texts: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, known = texts
    monkeypatch.setattr(encoding, "_LONGEST_PIECE", 50)
    long = "\n".join(known[:5]) + "x" * 120
    pieces = list(encoding.pieces_of(long))
    assert "".join(pieces) == long
    assert max(map(len, pieces)) <= 50
    assert pieces[0].endswith("\n") or "\n" not in long[:50]
    metas = tokenize(options(folder), None)
    assert metas["train"].documents + metas["held-out"].documents == len(known)


MARKED = ["the end <|endoftext|> of <|endoftext|>", "<|endoftext|>", "<|endof", "text|> a"]


def test_a_mark_in_a_text_is_text(texts: tuple[Path, list[str]]) -> None:
    folder, _ = texts
    lines = "".join(json.dumps({"text": text}) + "\n" for text in MARKED)
    (folder / "marked.jsonl").write_text(lines)
    first = options(folder, held_out=0.0)
    tokenize(first, None)
    tokenizer = first.out / "tokenizer"
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    out = folder.parent / "again"
    line = ["tokenize", folder, "--out", out, "--tokenizer", tokenizer, "--held-out", "0"]
    assert run([str(word) for word in line]) == 0
    for shards in (Shards(first.out / "train"), Shards(out / "train")):
        assert shards.meta.vocabulary.end_of_text == 0
        for number in range(len(MARKED)):
            ids = shards.document(shards.meta.documents - len(MARKED) + number).tolist()
            assert ids.pop() == 0
            assert 0 not in ids
            assert backend.decode(ids) == MARKED[number]


def with_an_ordinary_mark() -> Tokenizer:
    """The file does not say that the mark is special."""
    letters = {letter: number for number, letter in enumerate("</s>ab")}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.add_tokens([AddedToken("</s>", special=False)])
    return tokenizer


def with_a_mark_among_its_words() -> Tokenizer:
    """Unigrams are looked for in a text whatever they stand for."""
    letters = [(letter, -2.0) for letter in "</s>ab"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], 0, False))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("made", [with_an_ordinary_mark, with_a_mark_among_its_words])
def test_another_s_mark_in_a_text_is_text(made: Callable[[], Tokenizer]) -> None:
    backend = made()
    encoder = Encoder("other", backend, "</s>")
    before = encoder.vocabulary()
    marked = ["a</s></s>b", "</s>", "ab"]
    end = before.end_of_text
    assert end in backend.encode(marked[0]).ids
    found = list(PlainText(encoder).encode(marked))
    assert ["".join(map(str, map(backend.id_to_token, ids))) for ids in found] == marked
    assert not any(end in ids for ids in found)
    assert encoder.vocabulary() == before
    assert end in backend.encode(marked[0]).ids


def test_empty_texts_are_left_out(tmp_path: Path) -> None:
    """They would be documents of nothing but the mark of their end."""
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n')
    metas = tokenize(options(tmp_path / "in.jsonl", out=tmp_path / "out", train_bpe=257), None)
    assert sum(meta.documents for meta in metas.values()) == 1
    assert sum(meta.tokens for meta in metas.values()) == 2


def test_shards_that_are_lost_after_the_end_are_told(texts: tuple[Path, list[str]]) -> None:
    folder, _ = texts
    tokenize(options(folder), None)
    meta = folder.parent / "shards" / "train" / "meta.json"
    meta.unlink()
    with pytest.raises(ConfigError, match=r"train was finished, but is damaged .*delete"):
        tokenize(options(folder), None)


@pytest.mark.parametrize("ending", [".tokens", ".ends"])
def test_a_file_that_is_lost_after_the_end_is_told(
    texts: tuple[Path, list[str]], ending: str
) -> None:
    folder, _ = texts
    done = options(folder)
    tokenize(done, None)
    lost = done.out / "train" / f"00001{ending}"
    lost.unlink()
    wanted = f"{lost} is missing; copy {lost.parent} again, or run `fourfold tokenize` with another"
    for read in (lambda: tokenize(done, None), lambda: Shards(lost.parent)):
        with pytest.raises(ConfigError, match=wanted):
            read()


def test_copies_of_a_text_are_on_one_side() -> None:
    chosen = [number for number in range(20000) if is_held_out(text_of(number).encode(), 0.1)]
    assert len(chosen) == pytest.approx(2000, rel=0.1)
    assert not any(is_held_out(text_of(number).encode(), 0.0) for number in range(100))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl", b'{"text": 5}\n', "line 1: text is int, not text"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no field 'text'.*body"),
        ("x.jsonl", b'{"text": "a"\n', "line 1"),
        ("x.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("x.parquet", b"PAR0", "not readable Parquet"),
        ("x.jsonl.gz", b"plain", "x.jsonl.gz, line 0"),
        ("x.zip", b"PK", "there is no text in"),
    ],
)
def test_texts_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        tokenize(options(tmp_path / "in", out=tmp_path / "out", train_bpe=257), None)


def test_the_command_takes_another_s_tokenizer(
    texts: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = texts
    tokenize(options(folder), None)
    teacher, out = folder.parent / "shards/tokenizer", folder.parent / "again"
    line = ["tokenize", folder, "--out", out, "--tokenizer", teacher, "--held-out", "0.2"]
    assert run([str(word) for word in line]) == 0
    said = capsys.readouterr().err
    assert "train" in said
    assert "bytes a token" in said
    for split in ("train", "held-out"):
        one = Shards(folder.parent / "shards" / split)
        other = Shards(out / split)
        assert msgspec.structs.replace(other.meta.vocabulary, name="bpe-300") == one.meta.vocabulary
        numbers = range(one.meta.documents)
        assert all(one.document(i).tolist() == other.document(i).tolist() for i in numbers)
    assert run(["tokenize", str(folder), "--out", str(out), "--train-bpe", "12"]) == 2
    assert "257" in capsys.readouterr().err


def test_too_little_text_for_a_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.txt").write_text("abc abc")
    with pytest.raises(ConfigError, match="set --train-bpe 2"):
        tokenize(options(tmp_path / "in", out=tmp_path / "out", train_bpe=4096), None)
