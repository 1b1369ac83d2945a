"""How many tokens: a tiny language for length distributions.

    512                     always 512
    uniform:128:1024        every whole number from 128 to 1024, equally likely
    lognormal:512:0.8       median 512, sigma 0.8 (of the logarithm), at most 8 x 512
    lognormal:512:0.8:2048  the same, at most 2048

Log-normal is what lengths of real traffic look like: many short, a few very long. Values beyond
the maximum are cut to it rather than drawn again, so one draw costs one random number.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from fourfold.errors import ConfigError

_FORMS = "512, uniform:128:1024 or lognormal:512:0.8[:MAX]"


class Lengths(Protocol):
    """A distribution of token counts, all at least 1."""

    def draw(self, rng: random.Random) -> int:
        """One token count."""


@dataclass(frozen=True)
class Fixed:
    """Always `tokens`."""

    tokens: int

    def draw(self, rng: random.Random) -> int:
        return self.tokens


@dataclass(frozen=True)
class Uniform:
    """Every count from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class LogNormal:
    """Counts whose logarithm is normal around log(`median`), cut to 1 .. `high`."""

    median: int
    sigma: float
    high: int

    def draw(self, rng: random.Random) -> int:
        drawn = self.median * rng.lognormvariate(0.0, self.sigma)
        return round(min(max(drawn, 1.0), self.high))


def parse_lengths(spec: str, option: str) -> Lengths:
    """The distribution that `spec` names. ConfigError, naming `option`, where it names none."""
    try:
        match spec.split(":"):
            case [tokens]:
                return Fixed(_positive(tokens))
            case ["uniform", low, high] if _positive(low) <= _positive(high):
                return Uniform(int(low), int(high))
            case ["lognormal", median, sigma]:
                return LogNormal(_positive(median), _sigma(sigma), 8 * int(median))
            case ["lognormal", median, sigma, high] if _positive(median) <= _positive(high):
                return LogNormal(int(median), _sigma(sigma), int(high))
    except ValueError as error:
        raise ConfigError(f"{option} {spec!r}: {error}; write {_FORMS}") from error
    raise ConfigError(f"{option} {spec!r} is not a length; write {_FORMS}")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise ValueError(f"{text!r} is not a positive whole number")
    return int(text)


def _sigma(text: str) -> float:
    sigma = float(text)
    if not 0.0 <= sigma <= 4.0:
        raise ValueError(f"sigma {text} is not between 0 and 4")
    return sigma
