"""What processes that a benchmark starts answer on."""

from __future__ import annotations

import os
from typing import BinaryIO


def take_stdout() -> BinaryIO:
    """The standard output for answers alone: what libraries print there, also from C, goes to the
    standard error from here on."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers
