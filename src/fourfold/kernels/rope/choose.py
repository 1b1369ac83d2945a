"""How heads are dealt to blocks: pure functions of the shape."""

from __future__ import annotations

from typing import NamedTuple

_HEADS = 8
_ENOUGH_BLOCKS = 4096


class Tile(NamedTuple):
    """How the heads of one token are dealt."""

    blocks: int
    """Blocks that share a token."""
    heads: int
    """Heads of one kind that a block takes at a time."""
    warps: int


def choose_tile(tokens: int, heads: int, kv_heads: int, *, values: bool) -> Tile:
    """With many tokens, one block of one warp each, so that angles are loaded once. With few, every
    eight heads are a block of their own, of four warps: the step is a short chain of latencies.
    `values` says whether there is something to do for the heads of values, too."""
    if tokens >= _ENOUGH_BLOCKS:
        return Tile(1, _HEADS, 1)
    return Tile(-(-heads // _HEADS) + (1 + values) * -(-kv_heads // _HEADS), _HEADS, 4)
