"""Texts from a model: which are asked for, and which a file holds already."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from fourfold.errors import ConfigError
from fourfold.train.data.config import SampleConfig

_SEEDS = 1 << 31


class Sampled(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of the output. `text` begins with its opening."""

    index: int
    seed: int
    model: str
    """Whose text it is: a model trained on it learns from this one."""
    temperature: float
    top_p: float
    tokens: int
    """At most."""
    text: str
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A text to be sampled."""

    index: int
    opening: str
    """Empty: it begins with the mark that begins a text."""
    seed: int


class Sampling:
    """The texts of a run, in order. ConfigError for openings that cannot be read."""

    def __init__(self, config: SampleConfig) -> None:
        self._config = config
        self._openings = [""] if config.openings is None else _read_openings(config.openings)

    def wanted(self, index: int) -> Wanted:
        """Text number `index`."""
        # Seeds of neighbouring runs do not overlap until there are as many texts.
        seed = (self._config.seed * 1_000_003 + index) % _SEEDS
        return Wanted(index, self._openings[index % len(self._openings)], seed)

    def done(self, model: str) -> int:
        """How many texts the output holds; a last line cut short by a crash is removed.
        ConfigError where they are another run's."""
        out = self._config.out
        if not out.exists():
            return 0
        whole = out.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        lines = kept.splitlines()
        for index, line in enumerate(lines):
            try:
                had = msgspec.json.decode(line, type=Sampled)
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{out}, line {index + 1} is no sampled text ({error}); set another --out"
                ) from error
            wanted, asked = self.wanted(index), self._config
            same = (had.index, had.seed, had.model) == (index, wanted.seed, model)
            drawn = had.temperature, had.top_p, had.tokens
            same &= drawn == (asked.temperature, asked.top_p, asked.tokens)
            if not same or not had.text.startswith(wanted.opening):
                raise ConfigError(
                    f"{out}, line {index + 1} is of another model, seed or opening, or was drawn "
                    "with another --temperature, --top-p or --tokens; set another --out"
                )
        if len(kept) != len(whole):
            out.write_bytes(kept)
        return len(lines)


def _read_openings(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; set another --openings") from error
    openings = [line for line in lines if line.strip()]
    if not openings:
        raise ConfigError(f"{path} has no lines; write an opening in each, or leave it out")
    return openings
