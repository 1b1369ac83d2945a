"""A corpus of real text that anybody can make again: what installed packages say about themselves.

The texts of Python packages and of Debian packages, each once, as JSON lines with the package and
its licence; `sources.json` sums up. The same packages give the same files.

A text that repeats mostly lines of earlier ones is left out like a copy: of modules made from one
another (two thirds of some packages) some would be trained on and others held out, and what is
measured would be memory.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from fourfold.errors import ConfigError
from fourfold.files import write_atomically
from fourfold.train.data.config import PackagesConfig
from fourfold.train.data.debian_texts import debian_texts
from fourfold.train.data.python_texts import python_texts
from fourfold.train.data.texts import UNKNOWN_LICENCE, Package, Text

_FILE_BYTES = 1 << 26
"""Of texts in one file, before compression."""
_LONGEST_LINE = 2000
_FEWEST_LETTERS = 0.6
_SHORTEST_LINE = 20
"""Characters of a line that tells where it is from; shorter ones are everywhere."""
_MOST_REPEATED = 0.5
"""Of the characters of such lines, what may have been in earlier texts."""
_SUMMARY = "sources.json"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What a package gave."""

    kind: str
    name: str
    version: str
    licence: str
    documents: int
    bytes: int
    """Of UTF-8 text."""


class Corpus(msgspec.Struct, frozen=True, kw_only=True):
    """What was gathered, as `sources.json` has it."""

    documents: int
    bytes: int
    left_out: dict[str, int]
    """Texts by the reason why they were left out."""
    sources: list[Source]


def gather(config: PackagesConfig, progress: Callable[[int, int], None]) -> Corpus:
    """Writes the corpus of this machine. `progress` is called with documents and bytes so far.
    ConfigError where a folder does not exist or no package gives a text; a corpus that was there is
    left alone then."""
    if absent := [folder for folder in config.python if not folder.is_dir()]:
        raise ConfigError(f"{absent[0]} is no folder; name folders with packages with --python")
    config.out.mkdir(parents=True, exist_ok=True)
    sources: dict[Package, list[int]] = {}
    left_out: dict[str, int] = {}
    texts = itertools.chain(python_texts(config), debian_texts(config.debian))
    writer = _LineWriter(config.out)
    done = size = 0
    known = _Known()
    for text in texts:
        raw = text.text.encode()
        if (reason := _unfit(text, config) or known.repeated(raw)) is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        if not done:
            for old in (*config.out.glob("documents-*.jsonl.gz"), config.out / _SUMMARY):
                old.unlink(missing_ok=True)
        writer.add(text)
        count = sources.setdefault(text.package, [0, 0])
        count[0] += 1
        count[1] += len(raw)
        done, size = done + 1, size + len(raw)
        progress(done, size)
    writer.close()
    if not done:
        raise ConfigError("no package gives a text; name folders with --python or --debian")
    corpus = Corpus(
        documents=done, bytes=size, left_out=dict(sorted(left_out.items())), sources=_sum(sources)
    )
    summary = msgspec.json.format(msgspec.json.encode(corpus), indent=2) + b"\n"
    write_atomically(config.out / _SUMMARY, summary)
    return corpus


def _unfit(found: Text, config: PackagesConfig) -> str | None:
    """Why a text is left out by itself, or None."""
    text = found.text
    if found.package.licence == UNKNOWN_LICENCE and not config.unknown_licences:
        return "no known licence"
    if len(text) < config.fewest_characters:
        return "short"
    if len(text) > config.most_characters:
        return "long"
    if max(map(len, text.splitlines()), default=0) > _LONGEST_LINE:
        return "long lines"
    letters = sum(character.isalpha() or character.isspace() for character in text)
    if letters < _FEWEST_LETTERS * len(text) or (not text.isprintable() and "\0" in text):
        return "no prose or code"
    return None


class _Known:
    """Hashes of the texts that were taken, and of their lines."""

    def __init__(self) -> None:
        self._texts: set[int] = set()
        self._lines: set[int] = set()

    def repeated(self, raw: bytes) -> str | None:
        """Why a text is left out for what was before it; or None, and then it is known, too."""
        whole = xxhash.xxh64_intdigest(raw)
        if whole in self._texts:
            return "a copy"
        lines = [line for line in map(bytes.strip, raw.splitlines()) if len(line) >= _SHORTEST_LINE]
        keys = [xxhash.xxh64_intdigest(line) for line in lines]
        sizes = [len(line) for line in lines]
        old = sum(size for key, size in zip(keys, sizes, strict=True) if key in self._lines)
        if old > _MOST_REPEATED * sum(sizes):
            return "nearly a copy"
        self._texts.add(whole)
        self._lines.update(keys)
        return None


class _LineWriter:
    """JSON lines in files of limited size that depend on the lines alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: list[bytes] = []
        self._bytes = self._files = 0

    def add(self, text: Text) -> None:
        line: dict[str, Any] = {
            "text": text.text,
            "package": text.package.name,
            "licence": text.package.licence,
            "path": text.path,
        }
        self._lines.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._bytes += len(self._lines[-1])
        if self._bytes >= _FILE_BYTES:
            self.close()

    def close(self) -> None:
        """Writes what is left."""
        if self._lines:
            path = self._folder / f"documents-{self._files:05d}.jsonl.gz"
            write_atomically(path, gzip.compress(b"".join(self._lines), 6, mtime=0))
            self._files += 1
            self._lines, self._bytes = [], 0


def _sum(sources: dict[Package, list[int]]) -> list[Source]:
    """The largest first."""
    found = [
        Source(
            kind=package.kind,
            name=package.name,
            version=package.version,
            licence=package.licence,
            documents=documents,
            bytes=size,
        )
        for package, (documents, size) in sources.items()
    ]
    return sorted(found, key=lambda source: (-source.bytes, source.kind, source.name))


def licences(sources: Iterable[Source]) -> Iterator[tuple[str, int]]:
    """Bytes of text under each licence, the most first."""
    total: dict[str, int] = {}
    for source in sources:
        total[source.licence] = total.get(source.licence, 0) + source.bytes
    return iter(sorted(total.items(), key=lambda item: (-item[1], item[0])))
