"""Errors a user meets: one sentence saying what is wrong and what to do about it.

Every room may raise these; `cli` prints them as one line and `api` maps them to an OpenAI error
body. Bugs of ours are plain assertions and tracebacks instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FourfoldError(Exception):
    """The base of every error meant for a user. `str(error)` is a sentence with its remedy."""


class CheckpointError(FourfoldError):
    """A checkpoint that cannot be found, read, or computed as written."""


class ConfigError(FourfoldError):
    """An option or combination of options that cannot be honoured."""


class AuthenticationError(FourfoldError):
    """A process whose key differs from ours, or that is none of ours."""


class RequestError(FourfoldError):
    """A request that is refused before anything is allocated (HTTP 400).

    `param` names the request field at fault; `code` is a stable machine-readable word.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class OverloadedError(FourfoldError):
    """The server holds as many requests as it may; try again after `retry_after` seconds (429)."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrainingError(FourfoldError):
    """The server is shutting down and admits nothing new (HTTP 503)."""


class RequestFailedError(FourfoldError):
    """An accepted request that could not be finished, for a reason of the server's (HTTP 500)."""


class DeadlineError(RequestFailedError):
    """An accepted request that outlived its time limit (HTTP 504 before the first byte)."""


def meant(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a sentence about a word that is not known: the one that it nearly is, or else
    `otherwise`, or all that are known."""
    names = list(known)
    for near in difflib.get_close_matches(word[:64], names, n=1, cutoff=0.8):
        return f"did you mean '{near}'?"
    return f"known are {', '.join(names)}" if otherwise is None else otherwise
