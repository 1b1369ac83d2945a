"""How the programs of decode attention are built: a pure function of the tile."""

from __future__ import annotations

from typing import NamedTuple

# So that three programs of four warps share an SM.
_REGISTERS = {64: 168}
_PROGRAMS = {16: 5, 32: 4, 64: 3}


class Build(NamedTuple):
    """What Triton compiles a tile to."""

    warps: int
    stages: int
    """Of the loop over pages, two for each page that is on its way and one that is read."""
    open_tokens: int
    """Tokens of a step over the open page."""
    registers: int | None
    """Of a thread at most; None: as many as it likes."""


def programs_per_sm(tile: int, head_width: int) -> int:
    """How many programs share an SM, by their shared memory and registers."""
    return _PROGRAMS[tile] * (1 if head_width == 128 else 2)


def choose_build(tile: int) -> Build:
    """One warp for 16 rows, so that warps have nothing to exchange; as many pages on their way as
    let several programs share an SM."""
    return Build(
        warps=tile // 16,
        stages=5,
        open_tokens=32,
        registers=_REGISTERS.get(tile),
    )
