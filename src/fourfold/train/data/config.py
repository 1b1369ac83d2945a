"""The options of the commands that make training data. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fourfold.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Writes texts as shards of token ids, split by document; run it again to resume.

    A .txt, .md or .rst file is one document; .jsonl, .jsonl.gz and .parquet have one in every line
    or row. `OUT/train` and `OUT/held-out` are what `fourfold train` reads, `OUT/tokenizer` is what
    its checkpoints get.
    """

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files and folders with texts."""
    out: Path
    """The folder to write."""
    tokenizer: str | None = None
    """Whose tokenizer is taken: a directory, a .gguf file, a hub id, or `default`."""
    train_bpe: int | None = None
    """Train a tokenizer of so many ids on the texts, instead of --tokenizer."""
    bpe_megabytes: int = 64
    """Megabytes of text that a tokenizer is trained on, taken evenly from all of it."""
    field: str = "text"
    """The field of JSON lines, and the column of .parquet files, that has the text."""
    held_out: float = 0.01
    """Share of the documents that are kept from training, by a hash of their text."""
    shard_tokens: int = 1 << 26
    """Tokens after which a shard is full and the next begins."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("name at least one file or folder with texts")
        if (self.tokenizer is None) == (self.train_bpe is None):
            raise ConfigError("give either --tokenizer or --train-bpe")
        if self.train_bpe is not None and not 257 <= self.train_bpe <= 1 << 20:
            raise ConfigError(
                f"--train-bpe {self.train_bpe}: a byte-level tokenizer has 257 to {1 << 20} ids"
            )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"--held-out {self.held_out}: give a share from 0 to below 1")
        if self.shard_tokens < 1 or self.bpe_megabytes < 1:
            raise ConfigError("--shard-tokens and --bpe-megabytes must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackagesConfig:
    """Gathers the texts of installed packages into JSON lines: documentation, docstrings and
    sources of Python packages, and Debian's /usr/share/doc and manual pages."""

    out: Path
    """The folder to write: documents-*.jsonl.gz, and sources.json with packages and licences."""
    python: tuple[Path, ...] = ()
    """Folders with Python packages; without it, those that this Python finds its packages in."""
    debian: Path = Path("/usr/share")
    """The folder that has doc/ and man/; what is missing is left out."""
    fewest_characters: int = 200
    """Shorter texts are left out."""
    most_characters: int = 200_000
    """Longer texts are left out, of longer modules all but their docstrings."""
    unknown_licences: bool = False
    """Keep packages whose licence is not found, too."""

    def __post_init__(self) -> None:
        if not 0 < self.fewest_characters <= self.most_characters:
            raise ConfigError("--fewest-characters must be from 1 to --most-characters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How text is sampled from a model."""

    out: Path
    """JSON lines of texts, continued if it exists."""
    documents: int = 1000
    """How many texts."""
    tokens: int = 512
    """Tokens of a text at most."""
    temperature: float = 1.0
    """1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this much probability."""
    openings: Path | None = None
    """A text file whose lines begin the texts, in turn; without it, a text begins with the mark
    that begins the model's texts."""
    seed: int = 0
    """Text number i is drawn with a seed of its own, made of this and i."""

    def __post_init__(self) -> None:
        if self.documents < 1 or self.tokens < 1:
            raise ConfigError("--documents and --tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("--temperature must not be negative, --top-p above 0 and at most 1")
