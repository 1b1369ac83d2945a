"""Texts to shards of token ids: streaming, in one order, and continued where it was killed.

The state of all that was written is kept in `progress.json`; what lies in the shards beyond it is
cut off when a run continues. A document's split follows from a hash of its text, so that copies of
a text are never on both sides.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import xxhash
from tokenizers import Tokenizer

from fourfold.errors import ConfigError
from fourfold.files import write_atomically
from fourfold.train.data.bpe import END_OF_TEXT, fingerprint, save_tokenizer, train_bpe
from fourfold.train.data.config import TokenizeConfig
from fourfold.train.data.documents import find_inputs, read_documents
from fourfold.train.data.encoding import Encoder, PlainText
from fourfold.train.data.shards import (
    META,
    IdType,
    Shards,
    ShardsMeta,
    ShardWriter,
    SplitState,
)

TRAIN, HELD_OUT, TOKENIZER = "train", "held-out", "tokenizer"
_PROGRESS = "progress.json"
_DOCUMENTS_AT_ONCE = 128
_CHARACTERS_AT_ONCE = 1 << 22
_SAVED_EVERY = 1 << 25
"""Bytes of text between two states."""

Progress = Callable[[int, int], None]
"""Called with files read and files in all."""


class _State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far tokenising came. `document` of `file` is the next to be read."""

    work: str
    """A hash of what is tokenised and how."""
    file: int = 0
    document: int = 0
    splits: dict[str, SplitState] = {}
    done: bool = False


def tokenize(
    config: TokenizeConfig, encoder: Encoder | None, progress: Progress = lambda done, total: None
) -> dict[str, ShardsMeta]:
    """Writes the shards of both splits; returns what they hold.

    Without `encoder`, a tokenizer is trained, as `config.train_bpe` says. ConfigError where a text
    cannot be read, or the folder holds other work.
    """
    files = find_inputs(config.inputs)
    work = _work(config, files)
    state = _read_state(config.out, work)
    if encoder is None:
        encoder = _trained(config, files)
    vocabulary = encoder.vocabulary()
    dtype = IdType.for_vocabulary(vocabulary.tokens)
    if state.done:
        return {split: _finished(config.out / split) for split in (TRAIN, HELD_OUT)}
    if state.file == state.document == 0:
        save_tokenizer(encoder.backend, encoder.end_of_text, config.out / TOKENIZER)
        _write_state(config.out / _PROGRESS, state)  # it is not trained again
    elif fingerprint(_saved(config.out)) != vocabulary.sha256:
        raise ConfigError(
            f"{config.out} was begun with another tokenizer; continue with the same one or name "
            "another --out"
        )
    writers = {
        split: ShardWriter(
            config.out / split, dtype, config.shard_tokens, state.splits.get(split, SplitState())
        )
        for split in (TRAIN, HELD_OUT)
    }
    _write_documents(config, files, encoder, state, writers, progress)
    metas = {split: writer.finish(split, vocabulary) for split, writer in writers.items()}
    _write_state(config.out / _PROGRESS, _State(work=work, done=True))
    return metas


def _write_documents(
    config: TokenizeConfig,
    files: Sequence[Path],
    encoder: Encoder,
    state: _State,
    writers: dict[str, ShardWriter],
    progress: Progress,
) -> None:
    end = encoder.vocabulary().end_of_text
    mark = [] if end is None else [end]
    plain = PlainText(encoder)
    unsaved = 0
    for place, texts in _chunks(files, config.field, state.file, state.document):
        for text, ids in zip(texts, plain.encode(texts), strict=True):
            raw = text.encode()
            split = HELD_OUT if is_held_out(raw, config.held_out) else TRAIN
            writers[split].add([*ids, *mark] if ids else [], len(raw))
            unsaved += len(raw)
        if unsaved >= _SAVED_EVERY:
            splits = {split: writer.state() for split, writer in writers.items()}
            now = _State(work=state.work, file=place[0], document=place[1], splits=splits)
            _write_state(config.out / _PROGRESS, now)
            unsaved = 0
        progress(place[0], len(files))


def is_held_out(text: bytes, share: float) -> bool:
    """Whether a text is among the share that is kept from training."""
    return _is_among(text, share, 0)


def _is_among(text: bytes, share: float, lot: int) -> bool:
    """Whether a text is among a share of all texts; each `lot` is drawn anew."""
    return xxhash.xxh64_intdigest(text, lot) < share * 2.0**64


def _chunks(
    files: Sequence[Path], field: str, file: int, document: int
) -> Iterator[tuple[tuple[int, int], list[str]]]:
    """Documents from a place on, some at a time, each time with the place behind them: the number
    of a file and of a document in it."""
    for number in range(file, len(files)):
        texts: list[str] = []
        characters = 0
        skipped = document if number == file else 0
        documents = itertools.islice(read_documents(files[number], field), skipped, None)
        for place, text in enumerate(documents, skipped + 1):
            texts.append(text)
            characters += len(text)
            if len(texts) == _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
                yield (number, place), texts
                texts, characters = [], 0
        yield (number + 1, 0), texts


def _trained(config: TokenizeConfig, files: Sequence[Path]) -> Encoder:
    """The tokenizer that this folder's texts gave before, or give now."""
    assert config.train_bpe is not None
    if (config.out / _PROGRESS).is_file():
        backend = _saved(config.out)
    else:
        texts = _evenly(config, files)
        backend = train_bpe(texts, config.train_bpe)
    return Encoder(f"bpe-{config.train_bpe}", backend, END_OF_TEXT)


def _evenly(config: TokenizeConfig, files: Sequence[Path]) -> Iterator[str]:
    """About `config.bpe_megabytes` of the text that is trained on: documents by lot, from all files
    as likely. A file on disk is taken to be as large as its texts."""
    left = config.bpe_megabytes << 20
    share = left / max(left, sum(path.stat().st_size for path in files))
    for path in files:
        for text in read_documents(path, config.field):
            raw = text.encode()
            if _is_among(raw, share, 1) and not is_held_out(raw, config.held_out):
                yield text
                left -= len(raw)
            if left <= 0:
                return


def _saved(out: Path) -> Tokenizer:
    path = out / TOKENIZER / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise ConfigError(
            f"{path} is not a readable tokenizer ({error}); delete {out} and begin again"
        ) from error


def _work(config: TokenizeConfig, files: Sequence[Path]) -> str:
    """What must be the same for a run to continue another. A file is taken to be the same while its
    size and the time of its last change are."""
    stats = [(path.as_posix(), path.stat()) for path in files]
    sizes = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    how = (config.field, config.held_out, config.shard_tokens, config.train_bpe, config.tokenizer)
    return hashlib.sha256(repr((sizes, how, config.bpe_megabytes)).encode()).hexdigest()


def _read_state(out: Path, work: str) -> _State:
    path = out / _PROGRESS
    if not path.is_file():
        return _State(work=work)
    try:
        state = msgspec.json.decode(path.read_bytes(), type=_State)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); delete {out} and begin again"
        ) from error
    if state.work != work:
        raise ConfigError(
            f"{out} was begun from other texts, or ones that have changed since, or with other "
            "options; repeat those, delete it, or name another --out"
        )
    return state


def _finished(folder: Path) -> ShardsMeta:
    """What shards hold of which nothing is missing."""
    try:
        msgspec.json.decode((folder / META).read_bytes(), type=ShardsMeta)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{folder} was finished, but is damaged ({error}); delete {folder.parent} and begin "
            "again"
        ) from error
    return Shards(folder).meta


def _write_state(path: Path, value: _State) -> None:
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
