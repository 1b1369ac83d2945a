"""Rows: every token predicted once an epoch, in an order that only seed and epoch decide."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fourfold.errors import ConfigError
from fourfold.train.data.batches import Batch, ReadAhead, ShardBatches, shuffled
from fourfold.train.data.shards import (
    IdType,
    Shards,
    ShardWriter,
    SplitState,
    Vocabulary,
)


def write(folder: Path, documents: list[list[int]], *, shard_tokens: int = 1000) -> Shards:
    writer = ShardWriter(folder, IdType.UINT16, shard_tokens, SplitState())
    for ids in documents:
        writer.add(ids, len(ids))
    writer.finish("train", Vocabulary(name="none", tokens=60000, sha256="", end_of_text=None))
    return Shards(folder)


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    """Documents of 1 to 40 tokens, no id twice."""
    draws = np.random.default_rng(0)
    ends = np.cumsum(draws.integers(1, 40, size=50))
    return [ids.tolist() for ids in np.split(np.arange(ends[-1]), ends[:-1])]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> Shards:
    return write(tmp_path_factory.mktemp("shards"), documents, shard_tokens=200)


def test_documents_come_back_from_several_shards(
    shards: Shards, documents: list[list[int]]
) -> None:
    assert len(shards.meta.shards) > 2
    assert [shards.document(i).tolist() for i in range(50)] == documents


def test_contents_are_told_from_others(
    shards: Shards, documents: list[list[int]], tmp_path: Path
) -> None:
    known = shards.contents()
    assert (known.tokens, known.documents) == (shards.meta.tokens, 50)
    moved = write(tmp_path / "moved", documents, shard_tokens=90).contents()
    assert moved.sha256 == known.sha256
    assert (
        str(moved)
        == f"{tmp_path}/moved ({known.tokens} tokens in 50 documents, {moved.sha256[:8]})"
    )
    first, second, *more = documents
    others = {
        "order": [second, first, *more],
        "id": [[60_000 - 1, *first[1:]], second, *more],
        "cut": [[*first, second[0]], second[1:], *more],
        "less": documents[:-1],
    }
    found = {write(tmp_path / name, other).contents().sha256 for name, other in others.items()}
    assert len(found - {known.sha256}) == len(others)


def test_an_epoch_predicts_every_token_once(shards: Shards) -> None:
    batches = ShardBatches(shards, rows=1, length=16, seed=3)
    rows = [batches.batch(i).tokens[0] for i in range(batches.batches_of_epoch)]
    predicted = torch.cat([row[1:] for row in rows])
    assert len(predicted.unique()) == len(predicted) == 16 * ((shards.meta.tokens - 1) // 16)
    # But for the ends of the epoch, what ends a row begins another.
    first, last = ({int(row[end]) for row in rows} for end in (0, -1))
    assert len(first - last) == len(last - first) == 1


def test_rows_of_one_document_are_apart(tmp_path: Path) -> None:
    shards = write(tmp_path, [list(range(4000)), *([5000 + i] for i in range(1000))])
    batches = ShardBatches(shards, rows=8, length=10, seed=3)
    whole = [bool((batches.batch(i).tokens < 4000).all()) for i in range(batches.batches_of_epoch)]
    assert sum(whole) < len(whole) / 2  # 0.8 ** 8 of them by chance, 0.8 in the order of the text


def test_rows_tell_documents_apart(shards: Shards, documents: list[list[int]]) -> None:
    home = {token: number for number, ids in enumerate(documents) for token in ids}
    batch = ShardBatches(shards, rows=4, length=64, seed=3).batch(1)
    for tokens, document in zip(batch.tokens.tolist(), batch.document.tolist(), strict=True):
        assert document[0] == 0
        pairs = zip(tokens[:-1], tokens[1:], document[:-1], document[1:], strict=True)
        for before, after, old, new in pairs:
            assert (new - old) == (home[before] != home[after])
            if old == new:
                assert after == before + 1


def test_a_batch_is_a_function_of_its_number(shards: Shards) -> None:
    onwards = ShardBatches(shards, rows=3, length=32, seed=5)
    known = [onwards.batch(i) for i in range(20)]  # more than one epoch
    for index in (19, 0, 7):
        again = ShardBatches(shards, rows=3, length=32, seed=5).batch(index)
        assert torch.equal(again.tokens, known[index].tokens)
        assert torch.equal(again.document, known[index].document)


def test_rows_do_not_depend_on_how_many_are_in_a_batch(shards: Shards) -> None:
    wide = ShardBatches(shards, rows=4, length=32, seed=5)
    narrow = ShardBatches(shards, rows=2, length=32, seed=5)
    assert torch.equal(
        torch.cat([wide.batch(i).tokens for i in range(6)]),
        torch.cat([narrow.batch(i).tokens for i in range(12)]),
    )


def test_epochs_and_seeds_have_other_orders(shards: Shards) -> None:
    batches = ShardBatches(shards, rows=1, length=32, seed=5)
    epoch = batches.batches_of_epoch
    assert not torch.equal(batches.batch(0).tokens, batches.batch(epoch).tokens)
    other = ShardBatches(shards, rows=1, length=32, seed=6)
    assert not torch.equal(batches.batch(0).tokens, other.batch(0).tokens)


def test_ranks_read_all_rows_and_none_twice(shards: Shards) -> None:
    batch = ShardBatches(shards, rows=6, length=32, seed=5).batch(2)
    parts = [batch.rows(rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    assert torch.equal(torch.cat([part.document for part in parts]), batch.document)
    with pytest.raises(ValueError, match="6 rows cannot be dealt to 4 ranks"):
        batch.rows(0, 4)


def test_the_shuffle_is_what_it_was() -> None:
    assert sorted(shuffled(1000, 7, 3).tolist()) == list(range(1000))
    assert shuffled(8, 0, 0).tolist() == [4, 0, 1, 7, 6, 2, 5, 3]


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    shards = write(tmp_path, [[1, 2, 3]])
    with pytest.raises(ConfigError, match="3 tokens, less than one row of 9"):
        ShardBatches(shards, rows=1, length=8, seed=0)


@pytest.mark.parametrize("damage", ["short", "missing", "ends"])
def test_damaged_shards_are_refused(tmp_path: Path, damage: str) -> None:
    write(tmp_path, [[1, 2, 3], [4, 5]])
    tokens = tmp_path / "00000.tokens"
    if damage == "short":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    elif damage == "missing":
        tokens.unlink()
    else:
        np.array([3, 4], "<u8").tofile(tmp_path / "00000.ends")
    with pytest.raises(ConfigError, match="tokenize"):
        Shards(tmp_path)


def test_splits_are_named_where_the_folder_around_them_was(tmp_path: Path) -> None:
    write(tmp_path / "train", [[1, 2, 3]])
    with pytest.raises(ConfigError, match=rf"holds no finished shards .*; name {tmp_path}/train$"):
        Shards(tmp_path)


class Counting:
    """Batches that remember in which thread which were read; number 5 fails."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.threads: set[str] = set()

    def batch(self, index: int) -> Batch:
        self.read.append(index)
        self.threads.add(threading.current_thread().name)
        if index == 5:
            raise OSError("the disk is gone")
        return Batch(torch.tensor([[index]]), torch.zeros(1, 1, dtype=torch.int32))


def test_reading_ahead_changes_nothing_and_has_a_bound() -> None:
    inner = Counting()
    with ReadAhead(inner, ahead=2) as batches:
        for index in (0, 1, 2, 9, 3):
            assert batches.batch(index).tokens.item() == index
            assert max(inner.read) <= max(index, *inner.read[:1], 9 if 9 in inner.read else 0) + 2
        with pytest.raises(OSError, match="the disk is gone"):
            batches.batch(5)
    assert threading.current_thread().name not in inner.threads
    assert len(inner.threads) == 1
