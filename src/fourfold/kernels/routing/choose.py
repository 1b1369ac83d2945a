"""How tokens that choose their experts are dealt to programs: a pure function of the shape."""

from __future__ import annotations

from typing import NamedTuple

_FEW_TOKENS = 16
_FEW_SCORES = 2048
_OF_WARP = 512
_ENOUGH_PROGRAMS = 1024


class LogitsTile(NamedTuple):
    """What one program holds of the logits of many tokens, and how often their sums are cut."""

    tokens: int
    experts: int
    channels: int
    """In each turn."""
    splits: int
    """Programs that share a sum, a power of two: what adds them up is compiled for each number."""


def choose_logits(tokens: int, experts: int, channels: int) -> LogitsTile:
    """More tokens a program read the weights fewer times; fewer leave none of the GPU idle."""
    tile = 32 if tokens <= 256 else 64 if tokens <= 1024 else 128
    block, depth = min(64, max(16, 1 << (experts - 1).bit_length())), 64
    tiles = -(-tokens // tile) * -(-experts // block)
    most = max(1, min(8, 256 // tiles, channels // depth))
    return LogitsTile(tile, block, depth, 1 << (most.bit_length() - 1))


class ChoiceTile(NamedTuple):
    """What one program holds."""

    tokens: int
    warps: int


def sorts_at_once(tokens: int, experts: int) -> bool:
    """Whether one program is to choose for all tokens, a warp each, and to sort their rows: with
    more scores it would take longer than many programs and another launch."""
    width = 1 << (experts - 1).bit_length()
    return tokens <= _FEW_TOKENS and tokens * width <= _FEW_SCORES


def choose_choice(tokens: int, width: int) -> ChoiceTile:
    """For scores of `width` experts, a power of two. One warp a program, because threads of a warp
    need no barriers between them. It takes as many tokens as its registers hold, so that they hide
    each other's latencies, if enough programs are left to fill a GPU; else one."""
    most = max(1, _OF_WARP // width)
    together = most if tokens >= most * _ENOUGH_PROGRAMS else 1
    return ChoiceTile(together, 1 if width <= _OF_WARP else 4)
