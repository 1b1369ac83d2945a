"""`fourfold corpus grammar`: shards of made-up text whose entropy is known."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

from fourfold.errors import ConfigError
from fourfold.train.data.grammar_config import GrammarConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GrammarConfig):
    """Writes documents of a grammar as shards for `fourfold train`."""

    out: Path
    """The folder to write: `OUT/train` and `OUT/held-out`."""
    tokens: int = 1 << 20
    """At least so many in the train split."""
    held_out_tokens: int = 1 << 17
    """At least so many in the held-out split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1 or self.held_out_tokens < 1:
            raise ConfigError("--tokens and --held-out-tokens must be at least 1")


def run(options: Options) -> int:
    from fourfold.train.data.grammar import Grammar, write_grammar

    grammar = Grammar(options)
    wanted = {"train": options.tokens, "held-out": options.held_out_tokens}
    try:
        for stream, (split, tokens) in enumerate(wanted.items()):
            written = write_grammar(grammar, options.out / split, split, stream, tokens)
            print(f"{options.out / split}: {written:,} tokens", file=sys.stderr)
    except OSError as error:
        raise ConfigError(f"{options.out} cannot be written ({error}); set --out") from error
    low, high = grammar.entropy
    print(
        f"entropy: {low:.4f} to {high:.4f} nats a token, of ln {options.vocabulary} = "
        f"{math.log(options.vocabulary):.4f}",
        file=sys.stderr,
    )
    return 0
