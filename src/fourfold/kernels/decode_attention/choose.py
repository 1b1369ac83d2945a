"""How the programs of decode attention are built: a pure function of the tile and of how many there
are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_WIDE_TILE = 64
_REGISTERS_OF_WIDE = 168  # so that three programs share an SM
_REGISTERS_OF_FEW = 160
# How many programs share an SM, of heads of 128 and of 64. Of wide tiles, those on Hopper.
_PROGRAMS = {16: (5, 10), 32: (4, 8), 64: (2, 3)}
_PROGRAMS_OF_FEW = 3
_FEW_TILE = 16
_FEW_PROGRAMS = 264
FEW_ROWS = 16
"""Query rows at most that are few: each program is waited for, of attention and of the merge."""
_SMS = 132
_MERGED_HEADS = 32  # of a row, so many that a program merges without spilling registers
_AT_ONCE, _AT_ONCE_OF_FEW = 8, 16
MANY_PARTIALS = 64
"""The class of rows in more pieces than one program merges."""


class Build(NamedTuple):
    """What a tile is compiled to."""

    warps: int
    few: bool
    """Made to end soon, not to keep a GPU busy together with many others: several warps share 16
    rows, and what is there already is read before the kernel before has ended."""
    stages: int = 5
    """Of the loop over pages, two for each page that is on its way and one that is read."""
    open_tokens: int = 32
    """Tokens of a step over the open page; of many programs."""
    registers: int | None = None
    """Of a thread at most; None: as many as it likes."""
    gluon: bool = False
    """By the kernel for Hopper, whose stages are pages."""


def programs_per_sm(tile: int, head_width: int, *, few: bool) -> int:
    """How many programs share an SM, by their shared memory and registers."""
    if few:
        return _PROGRAMS_OF_FEW
    return _PROGRAMS[tile][head_width < 128]


def are_few(rows: int, tasks: Sequence[tuple[int, int]], kv_heads: int) -> bool:
    """Whether a step of so many query rows waits for each program rather than for the memory.

    `tasks` are the tiles and how many tasks have each. Where there are several tiles their kernels
    share the SMs, of which a wide tile of several warps more would fill one by itself.
    """
    if len(tasks) > 1 or tasks[0][0] != _FEW_TILE:
        return False
    programs = tasks[0][1] * kv_heads
    return programs <= _FEW_PROGRAMS or (rows <= FEW_ROWS and programs <= 2 * _FEW_PROGRAMS)


def choose_build(tile: int, head_width: int, *, few: bool, hopper: bool) -> Build:
    """Of many, one warp for 16 rows, so that warps have nothing to exchange, and as many pages on
    their way as let several programs share an SM. `hopper`: whether the GPU is of that generation
    (compute capability 9.0)."""
    if few:
        return Build(warps=4, few=True, registers=_REGISTERS_OF_FEW)
    if tile < _WIDE_TILE:
        return Build(warps=tile // 16, few=False)
    if hopper:
        # Where a head is narrow, a third program has room beside two.
        registers = _REGISTERS_OF_WIDE if head_width == 64 else 255
        return Build(warps=4, few=False, stages=4, registers=registers, gluon=True)
    return Build(warps=4, few=False, registers=_REGISTERS_OF_WIDE)


def most_at_once(rows: int) -> int:
    """Partials of one row up to which one program merges all heads of it, where so many query rows
    decode: where these are few, what it reads at once. Beyond, each head has a program of its own,
    and the row is coded by another kernel."""
    return _AT_ONCE_OF_FEW if rows <= FEW_ROWS else _AT_ONCE


def merged_class(merged: int, rows: int) -> int:
    """The partials of one row that buffers for so many query rows are made for, where a plan has
    `merged`: of few numbers, so that few graphs are captured."""
    at_once = most_at_once(rows)
    return at_once if merged <= at_once else MANY_PARTIALS


class MergeBuild(NamedTuple):
    """What Triton compiles the merge on the way to 8-bit rows to."""

    warps: int
    partials: int
    """Read at once."""
    registers: int | None
    """As of `Build`."""
    sealing: int
    """Programs that may seal pages in the same launch."""


def choose_merge(rows: int, heads: int, *, merges: bool) -> MergeBuild:
    """For so many rows of a step, those that do not decode included, of which some may be in
    pieces, and their query heads. With few rows, a program has an SM to itself but for what the
    kernel before left there, and is waited for. Where heads are many, it reads fewer partials of
    all of them at once."""
    sealing = max(16, _SMS - rows) if rows <= _SMS else 256
    warps = 16 if rows <= _SMS else 8
    if not merges:
        return MergeBuild(warps, partials=1, registers=None, sealing=sealing)
    if heads > _MERGED_HEADS:
        partials = max(1, 4 * _MERGED_HEADS // (1 << (heads - 1).bit_length()))
        return MergeBuild(warps, partials, registers=None, sealing=sealing)
    if rows <= FEW_ROWS:
        return MergeBuild(warps, partials=_AT_ONCE_OF_FEW, registers=96, sealing=sealing)
    return MergeBuild(warps, partials=4, registers=64 if warps == 16 else 80, sealing=sealing)


def merge_of_heads(merged: int, rows: int) -> tuple[int, int]:
    """Partials that a program for one head of a row reads at once, and its warps. Of few rows each
    program is waited for; of many, larger programs would mostly wait for partials that are not
    there."""
    return (64, 4) if merged > 16 and rows <= FEW_ROWS else (16, 1)
