"""`fourfold tokenize`: texts to shards of token ids that `fourfold train` reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.errors import ConfigError
from fourfold.models.checkpoint.source import find_source
from fourfold.train.data.config import TokenizeConfig as Options

if TYPE_CHECKING:
    from fourfold.train.data.encoding import Encoder
    from fourfold.train.data.shards import ShardsMeta

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fourfold.train.data.tokenizing import tokenize

    encoder = None if options.tokenizer is None else _encoder(options.tokenizer)
    columns = TextColumn("tokenize"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, disable=not console.is_interactive) as bar:
            task = bar.add_task("tokenize", total=None)
            metas = tokenize(
                options, encoder, lambda done, total: bar.update(task, completed=done, total=total)
            )
    except OSError as error:
        raise ConfigError(f"{options.out} cannot be written ({error}); set --out") from error
    for split, meta in metas.items():
        print(_summary(options.out / split, meta), file=sys.stderr)
    return 0


def _encoder(name: str) -> Encoder:
    from fourfold.gateway.tokenizer import load_tokenizer
    from fourfold.train.data.encoding import Encoder

    source = find_source(name, weights=False)
    words = load_tokenizer(source)
    end = words.specials.get("eos_token")
    if end is not None and words.backend.token_to_id(end) is None:
        end = None
    return Encoder(source.model_id, words.backend, end)


def _summary(folder: Path, meta: ShardsMeta) -> str:
    size = f"{meta.tokens:,} tokens in {meta.documents:,} documents"
    if not meta.tokens:
        return f"{folder}: {size}"
    return f"{folder}: {size}, {meta.text_bytes / meta.tokens:.2f} bytes a token"
