"""How tokens that choose their experts are dealt to programs: a pure function of the shape."""

from __future__ import annotations

from typing import NamedTuple

FEW_TOKENS = 16
"""Tokens that one program chooses for and sorts: more would be long about it."""
_OF_WARP = 512
_ENOUGH_PROGRAMS = 1024


class ChoiceTile(NamedTuple):
    """What one program holds."""

    tokens: int
    warps: int


def choose_choice(tokens: int, width: int) -> ChoiceTile:
    """For scores of `width` experts, a power of two. One warp a program, because threads of a warp
    need no barriers between them. It takes as many tokens as its registers hold, so that they hide
    each other's latencies, if enough programs are left to fill a GPU; else one."""
    most = max(1, _OF_WARP // width)
    together = most if tokens >= most * _ENOUGH_PROGRAMS else 1
    return ChoiceTile(together, 1 if width <= _OF_WARP else 4)
