"""Which tiles a product uses, from its shape and the GPU; pure, so that it is tested anywhere."""

from __future__ import annotations

import dataclasses

_HOPPER_STAGES = {16: 8, 32: 8, 64: 6, 128: 5}
_SHARED_MEMORY = (227 << 10) - 2048  # bytes, less scales and barriers
_PARAMETERS = 2 * 4 * 64 * 2  # bytes of a block's group parameters


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut."""

    half: int
    """Output rows of one of a program's two runs."""
    tokens: int
    """Tokens of a program."""
    stages: int
    """Blocks of input channels in flight."""
    warps: int
    programs: int
    """Programs at most on one processor of the GPU; what is left over they do in turns."""
    split: int = 1
    """Blocks of input channels that a program multiplies side by side, one in each of its warps."""
    hopper: bool = False
    """Whether the Gluon kernel runs: `half` 128, 4 warps and 1 program."""
    unroll: int = 1
    """In the Gluon kernel, blocks at most that a warp group multiplies without a pause."""


def choose_grouped(tokens: int, *, groups: bool, hopper: bool) -> Tiles:
    """Tiles for grouped products of `tokens` tokens to a tile.

    Args:
        tokens: rows of a tile of `RowGroups`.
        groups: whether the weight has parameters for groups of input channels.
        hopper: whether the GPU is of that generation (compute capability 9.0).
    """
    if hopper and (groups or tokens > 32):
        # Parameters of groups arrive with the weights there; Triton has to wait for them.
        unroll = 2 if groups and tokens > 64 else 1
        return Tiles(128, tokens, _HOPPER_STAGES[tokens], 4, 1, hopper=True, unroll=unroll)
    if tokens <= 32:
        return Tiles(64, tokens, 4, 4, 32)
    return Tiles(64, tokens, 4, 4, 4 if tokens <= 64 else 2)


def choose_dense(
    tokens: int, blocks: int, *, bits: int, groups: bool = False, hopper: bool
) -> Tiles:
    """Tiles for products of `tokens` tokens with one weight of `blocks` blocks of input channels.

    Few tokens and one weight make few tiles, so those are small. `bits` are the weight's; `groups`
    and `hopper` as in `choose_grouped`.
    """
    if bits == 8:
        if tokens > 64:
            return Tiles(128, 128, 4, 8, 1)
        return Tiles(64, 16 if tokens <= 16 else 64, 4, 4, 8)
    if tokens <= 16:
        if blocks % 4 == 0 and blocks > 16:
            return Tiles(16, 16, 4, 4, 8, split=4)
        return Tiles(32, 16, 5, 4, 32)
    if tokens <= 32:
        return Tiles(64, 32, 4, 4, 32)
    tile = 64 if tokens <= 512 else 128
    if hopper and tokens > 64:
        unroll = 2 if groups or tile == 64 else 1
        return Tiles(128, tile, _HOPPER_STAGES[tile], 4, 1, hopper=True, unroll=unroll)
    return Tiles(64, tile, 4, 4, 4 if tile == 64 else 2)


def hopper_stages(tiles: Tiles, itemsize: int) -> int:
    """Blocks in flight in the Gluon kernel: as many as asked for that fit into shared memory beside
    the results, of `itemsize` bytes each."""
    block = 4 * 64 * 64 + tiles.tokens * 128 + _PARAMETERS
    results = 2 * tiles.tokens * 64 * itemsize
    return min(tiles.stages, (_SHARED_MEMORY - results) // block)
