"""How the sampling kernels cut a vocabulary, from its size alone.

Never from the number of rows: a row must be added up in the same order in every batch.
"""

from __future__ import annotations

import dataclasses

CHUNK = 32
"""Tokens whose largest logit is noted; those of one word of the bitmap of `TokenTables`."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """One choice."""

    tile: int
    """Tokens that one program scans."""
    tiles: int
    chunks: int
    listed: int
    """Chunks, the likeliest, that are read again to find the filters' reach."""
    limit: int
    """Tokens of them among which it is sought."""
    scan_warps: int
    draw_warps: int


def choose(
    vocabulary: int, *, tile: int | None = None, listed: int = 512, limit: int = 2048
) -> Cut:
    """The choice for a vocabulary; `tile`, `listed` and `limit` are powers of two."""
    tile = tile or min(4096, max(1024, power_of_two(vocabulary)))
    return Cut(
        tile=tile,
        tiles=-(-vocabulary // tile),
        chunks=-(-vocabulary // CHUNK),
        listed=listed,
        limit=limit,
        scan_warps=max(1, tile // 512),
        draw_warps=max(1, min(8, limit // 64)),
    )


def power_of_two(number: int) -> int:
    """The next that is no smaller."""
    return 1 << max(0, number - 1).bit_length()
