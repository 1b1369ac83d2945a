"""How rows are dealt to blocks: pure functions of the shape.

Shapes: T rows, W channels.
"""

from __future__ import annotations

from typing import NamedTuple

_ELEMENTS = 4096
_ELEMENTS_TURNED = 8192
_ENOUGH_BLOCKS = 1024


class Tile(NamedTuple):
    """What one block holds."""

    rows: int
    channels: int
    """A power of two; a whole row lies in one block."""
    warps: int


def choose_tile(rows: int, width: int, *, turned: bool = False, swiglu: bool = False) -> Tile:
    """Several short rows a block, so that each thread has some loads in flight, and more of them
    where each block also fetches a matrix to turn them by; but one row a block, and more threads
    for it, while there are too few blocks to fill a GPU. With `swiglu` an element is made of two,
    and a thread has half as many."""
    elements = _ELEMENTS_TURNED if turned and not swiglu else _ELEMENTS
    channels = _power_of_two(max(width, 32))
    together = 1
    while 2 * together * channels <= elements and rows // (2 * together) >= _ENOUGH_BLOCKS:
        together *= 2
    alone = rows < _ENOUGH_BLOCKS and channels >= _ELEMENTS // 2
    warps = 8 if alone or channels > elements else 4
    if swiglu and channels > 2 * elements:
        warps = 16
    return Tile(together, channels, warps)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
