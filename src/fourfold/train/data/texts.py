"""A text of a package, and where it came from."""

from __future__ import annotations

import dataclasses

UNKNOWN_LICENCE = "unknown"
_MARKS = {
    "apache license": "Apache-2.0",
    "redistribution and use in source and binary forms": "BSD",
    "permission is hereby granted, free of charge": "MIT",
    "mozilla public license": "MPL-2.0",
    "gnu lesser general public license": "LGPL",
    "gnu general public license": "GPL",
    "python software foundation license": "PSF-2.0",
}
"""What licences say, in small letters."""


def named_licence(text: str) -> str:
    """The name of a licence by its text; `UNKNOWN_LICENCE` where there is no known one."""
    small = " ".join(text.lower().split())
    found = [name for mark, name in _MARKS.items() if mark in small]
    return found[0] if found else UNKNOWN_LICENCE


@dataclasses.dataclass(frozen=True)
class Package:
    """What texts came from. `kind` is "python" or "debian"; `licence` is as the package says."""

    kind: str
    name: str
    version: str
    licence: str


@dataclasses.dataclass(frozen=True)
class Text:
    """One document."""

    package: Package
    path: str
    """Relative to the folder that packages are in."""
    text: str
