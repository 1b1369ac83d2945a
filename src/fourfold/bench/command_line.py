"""Options of all benchmarks: the command line that repeats a run, made from those it ran with, and
a check that they share. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from fourfold.errors import ConfigError

# Not for a record; whoever repeats the run has their own.
_SECRETS = {"api_key": "API_KEY"}
_RESULTS = frozenset({"out", "details", "profiles"})


def command_line(command: str, options: Any, *, positional: str | None = None) -> str:
    """`command` with every option of a dataclass that is not its default, quoted for a shell; where
    results go is left to whoever repeats the run."""
    words = command.split()
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name in _RESULTS:
            continue
        if field.name != positional:
            words.append("--" + field.name.replace("_", "-"))
        if field.name in _SECRETS:
            words.append(_SECRETS[field.name])
        elif isinstance(value, tuple):
            words.extend(map(str, value))
        elif str(value).startswith("-") and field.name != positional:
            words[-1] += f"={value}"  # by itself it would be read as another option
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def check_distinct(option: str, values: Sequence[object]) -> None:
    """ConfigError where an option names the same twice: a record holds each figure once."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ConfigError(f"{option} names {value} twice; name it once")
