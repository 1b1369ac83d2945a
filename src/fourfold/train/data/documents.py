"""Texts from files: plain text, JSON lines, Parquet. One document at a time, in one order."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fourfold.errors import ConfigError

TEXT_ENDINGS = (".txt", ".md", ".rst")
_JSON_ENDINGS = (".jsonl", ".jsonl.gz")
_PARQUET_ENDING = ".parquet"
_ENDINGS = (*TEXT_ENDINGS, *_JSON_ENDINGS, _PARQUET_ENDING)
_ROWS = 256
"""Of a Parquet file that are in memory at once."""


def find_inputs(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths` and, of folders, those in them whose ending is known: absolute, so
    that it does not matter from where a folder is named; sorted, each once. ConfigError where there
    are none."""
    found: set[Path] = set()
    for path in paths:
        if path.is_dir():
            inside = path.resolve().rglob("*")
            found.update(p for p in inside if p.name.endswith(_ENDINGS) and p.is_file())
        elif path.is_file():
            # Its own name stays: what a link points to may have no ending.
            found.add(path.parent.resolve() / path.name)
        else:
            raise ConfigError(f"{path} does not exist; name files or folders with texts")
    if not found:
        named = ", ".join(map(str, paths)) or "nothing"
        raise ConfigError(f"there is no text in {named}; known endings are {', '.join(_ENDINGS)}")
    return sorted(found, key=lambda path: path.as_posix())


def read_documents(path: Path, field: str) -> Iterator[str]:
    """The texts of a file: one for a text file, or else what its lines or rows have as `field`.
    ConfigError for what cannot be read."""
    if path.name.endswith(_JSON_ENDINGS):
        return _read_lines(path, field)
    if path.name.endswith(_PARQUET_ENDING):
        return _read_rows(path, field)
    return _read_text(path)


def _read_text(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8: {error}; leave it out") from error


def _read_lines(path: Path, field: str) -> Iterator[str]:
    number = 0
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _field_of(msgspec.json.decode(line), field, f"{path}, line {number}")
    except (OSError, EOFError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}, line {number}: {error}; mend it or leave it out") from error


def _open_bytes(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_rows(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs `pip install 'fourfold[parquet]'`") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(field, str(path), file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _field_of({field: value}, field, f"{path}, row {row}")
                    row += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path} is not readable Parquet: {error}; leave it out") from error


def _field_of(entry: Any, field: str, where: str) -> str:
    if not isinstance(entry, dict) or field not in entry:
        raise _no_field(field, where, entry if isinstance(entry, dict) else ())
    text = entry[field]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {field} is {type(text).__name__}, not text; set --field")
    return text


def _no_field(field: str, where: str, known: Any) -> ConfigError:
    names = ", ".join(map(str, known)) or "none"
    return ConfigError(f"{where} has no field {field!r}; its fields are {names}; set --field")
