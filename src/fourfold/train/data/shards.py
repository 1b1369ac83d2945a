"""Token ids on disk: what tokenising writes and training reads.

A folder holds `meta.json` and for each shard two files: `00000.tokens`, little-endian ids one after
the other, and `00000.ends`, for each document where it ends in that shard (uint64). A document lies
in one shard. The folder is readable once it has its `meta.json`, which is written last.

Shapes: N documents.
"""

from __future__ import annotations

import enum
import hashlib
import os
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fourfold.errors import ConfigError
from fourfold.files import write_atomically

META = "meta.json"
Ids = NDArray[np.unsignedinteger]
Places = NDArray[np.int64]
_LOOKED_AT, _LOOKED_AT_IDS = 64, 256
"""About how many documents, and ids of each, tell shards from others with documents as long."""


class IdType(enum.StrEnum):
    """How an id lies on disk."""

    UINT16 = "uint16"
    UINT32 = "uint32"

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        if self is IdType.UINT16:
            return np.dtype("<u2")
        return np.dtype("<u4")

    @staticmethod
    def for_vocabulary(tokens: int) -> IdType:
        """The narrowest that holds every id of a vocabulary."""
        return IdType.UINT16 if tokens <= 1 << 16 else IdType.UINT32


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokenizer that the ids are of."""

    name: str
    tokens: int
    """How many ids there are."""
    sha256: str
    """Of its tokenizer.json."""
    end_of_text: int | None
    """The id behind every document; None where the tokenizer has no such mark."""


class ShardFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One shard; `file` is its name without the endings."""

    file: str
    tokens: int
    documents: int


class ShardsMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a folder of shards holds."""

    split: str
    """Which documents: "train" or "held-out"."""
    vocabulary: Vocabulary
    dtype: IdType
    text_bytes: int
    """UTF-8 bytes of the documents' texts: with them a loss per token is one per byte."""
    shards: tuple[ShardFile, ...]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


class Contents(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What shards hold, so that they are told from others."""

    folder: str
    tokens: int
    documents: int
    sha256: str
    """Of the tokenizer, of the documents' lengths in their order, and of the first ids of some.
    Where the shards lie and how they are cut changes nothing."""

    def __str__(self) -> str:
        return (
            f"{self.folder} ({self.tokens:,} tokens in {self.documents:,} documents, "
            f"{self.sha256[:8]})"
        )


class Shards:
    """Shards that were written, memory-mapped. ConfigError where a file is missing or not as long
    as `meta.json` says."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder = Path(folder)
        try:
            self.meta = msgspec.json.decode((folder / META).read_bytes(), type=ShardsMeta)
        except (OSError, msgspec.DecodeError) as error:
            splits = [str(path.parent) for path in sorted(folder.glob(f"*/{META}"))[::-1]]
            remedy = f"name {' or '.join(splits)}" if splits else "run `fourfold tokenize`"
            raise ConfigError(f"{folder} holds no finished shards ({error}); {remedy}") from error
        self._tokens = [_map(folder, shard, self.meta.dtype) for shard in self.meta.shards]
        ends = [_read_ends(folder, shard) for shard in self.meta.shards]
        documents = [shard.documents for shard in self.meta.shards]
        self._shard_N = np.repeat(np.arange(len(documents)), documents)
        begins = [np.concatenate([[0], e[:-1]]) if len(e) else e for e in ends]
        self._begin_N: Places = np.concatenate([*begins, np.zeros(0, np.int64)])
        end_N = np.concatenate([*ends, np.zeros(0, np.int64)])
        self.length_N: Places = end_N - self._begin_N
        """Tokens of each document."""

    def contents(self) -> Contents:
        """What tells these shards from others, found without reading all of their ids."""
        hashed = hashlib.sha256(self.meta.vocabulary.sha256.encode())
        hashed.update(self.length_N.astype("<i8", copy=False).data)
        count = len(self.length_N)
        for number in range(0, count, max(1, count // _LOOKED_AT)):
            hashed.update(self.document(number)[:_LOOKED_AT_IDS].astype("<u4").data)
        return Contents(
            folder=str(self._folder),
            tokens=self.meta.tokens,
            documents=count,
            sha256=hashed.hexdigest(),
        )

    def document(self, number: int) -> Ids:
        """A document's ids, still on disk."""
        begin = self._begin_N[number]
        whole = self._tokens[self._shard_N[number]]
        ids: Ids = whole[begin : begin + self.length_N[number]]
        return ids


def _map(folder: Path, shard: ShardFile, dtype: IdType) -> Ids:
    path = folder / f"{shard.file}.tokens"
    _check_size(path, shard.tokens * dtype.dtype.itemsize)
    if not shard.tokens:  # nothing cannot be mapped
        return np.zeros(0, dtype.dtype)
    mapped: Ids = np.memmap(path, dtype.dtype, mode="r")
    return mapped


def _read_ends(folder: Path, shard: ShardFile) -> Places:
    path = folder / f"{shard.file}.ends"
    _check_size(path, shard.documents * 8)
    ends = np.fromfile(path, "<u8").astype(np.int64)
    if (np.diff(ends, prepend=0) < 0).any() or (len(ends) and ends[-1] != shard.tokens):
        raise ConfigError(f"{path} does not fit its tokens; {_instead_of(folder)}")
    return ends


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else -1
    if size != expected:
        found = "is missing" if size < 0 else f"has {size} bytes instead of {expected}"
        raise ConfigError(f"{path} {found}; {_instead_of(path.parent)}")


def _instead_of(folder: Path) -> str:
    """What to do where shards that were finished are damaged."""
    return f"copy {folder} again, or run `fourfold tokenize` with another --out"


class SplitState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a `ShardWriter` came: enough to continue from."""

    shards: tuple[ShardFile, ...] = ()
    """The last is still being written."""
    text_bytes: int = 0


class ShardWriter:
    """Appends documents to the shards of one split.

    What was written after the last `state` is cut off when a writer begins from that state, so a
    killed run loses no more than that and doubles nothing.
    """

    def __init__(self, folder: Path, dtype: IdType, shard_tokens: int, state: SplitState) -> None:
        """`shard_tokens`: a shard that has as many is followed by the next."""
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards = list(state.shards)
        self._text_bytes = state.text_bytes
        self._ids: list[Ids] = []
        self._ends: list[int] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META).unlink(missing_ok=True)
        known = {shard.file for shard in self._shards}
        for path in folder.iterdir():
            if path.suffix in (".tokens", ".ends") and path.stem not in known:
                path.unlink()
        if self._shards:
            last = self._shards[-1]
            os.truncate(self._file(last.file, ".tokens"), last.tokens * dtype.dtype.itemsize)
            os.truncate(self._file(last.file, ".ends"), last.documents * 8)

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Appends one document; an empty one is left out."""
        if not ids:
            return
        if not self._shards or self._shards[-1].tokens >= self._shard_tokens:
            self._flush()
            self._shards.append(ShardFile(file=f"{len(self._shards):05d}", tokens=0, documents=0))
        last = self._shards[-1]
        self._ids.append(np.array(ids, self._dtype.dtype))
        self._ends.append(last.tokens + len(ids))
        self._shards[-1] = ShardFile(
            file=last.file, tokens=last.tokens + len(ids), documents=last.documents + 1
        )
        self._text_bytes += text_bytes

    def state(self) -> SplitState:
        """Writes what was added; it is on disk when this returns."""
        self._flush()
        return SplitState(shards=tuple(self._shards), text_bytes=self._text_bytes)

    def finish(self, split: str, vocabulary: Vocabulary) -> ShardsMeta:
        """Writes what was added and makes the folder readable."""
        state = self.state()
        meta = ShardsMeta(
            split=split,
            vocabulary=vocabulary,
            dtype=self._dtype,
            text_bytes=state.text_bytes,
            shards=state.shards,
        )
        lines = msgspec.json.format(msgspec.json.encode(meta), indent=2) + b"\n"
        write_atomically(self._folder / META, lines)
        return meta

    def _flush(self) -> None:
        if not self._ids:
            return
        name = self._shards[-1].file
        _append(self._file(name, ".tokens"), np.concatenate(self._ids))
        _append(self._file(name, ".ends"), np.array(self._ends, "<u8"))
        self._ids, self._ends = [], []

    def _file(self, name: str, ending: str) -> Path:
        return self._folder / f"{name}{ending}"


def _append(path: Path, values: NDArray[np.unsignedinteger]) -> None:
    with path.open("ab") as file:
        file.write(values.tobytes())
        file.flush()
        os.fsync(file.fileno())
