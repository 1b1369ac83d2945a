"""The options of a conversion. Imports nothing heavy, for the command line is built from them."""

from __future__ import annotations

import dataclasses
import enum


class Method(enum.StrEnum):
    """How codes are chosen."""

    RTN = "rtn"
    """The nearest to each weight; needs no text to calibrate on."""
    GPTQ = "gptq"
    """Those that change a product least on the inputs of a text."""


class Bits(enum.StrEnum):
    """What a group of matrices is kept in."""

    FOUR = "4"
    EIGHT = "8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What a model is converted to, and how."""

    recipe: str = "int8-g64"
    """A `W4A8Recipe`."""
    method: Method = Method.GPTQ
    attention: Bits = Bits.EIGHT
    """Query, key, value and output projections. The head always has 8 bits."""
