"""Every tile that could suit a product; pure, so that it is tested anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from fourfold.kernels.w4a8_gemm.choose import (
    DENSE_TILES,
    FEW_TOKENS,
    MOST_DENSE,
    MOST_SPLIT_TOKENS,
    Kernel,
    Tiles,
    choose_at_once,
    dense_tile,
)

_SHARED_MEMORY = 220 << 10
_REGISTERS = (16, 128)
"""Of a thread for its sums: with fewer the tensor cores starve, with more they spill."""
_TOKENS = (16, 32, 64, 128)
_STAGES = 4
"""Of the Triton kernel; three were 0-3 % slower wherever they were timed (docs/experiments.md)."""


def candidates(
    tokens: int, blocks: int, *, bits: int, grouped: bool, second: bool, hopper: bool
) -> list[Tiles]:
    """Tiles for products of `tokens` rows (of an expert, if `grouped`) with weights of `bits` bits
    and `blocks` blocks of input channels; those of the Gluon kernels too where `hopper`, and where
    `second`, those for an FFN's second product alone."""
    fewest, most = min(tokens // 8, _TOKENS[-1]), 2 * max(tokens, _TOKENS[0])
    rows = [each for each in _TOKENS if fewest <= each < most]
    found = list(_triton(rows, blocks, bits, splits=not grouped))
    if hopper:
        found += _gluon(rows, blocks)
    if hopper and bits == 8 and not grouped and FEW_TOKENS < tokens <= MOST_DENSE:
        found += _gluon_dense(tokens, blocks)
    if hopper and (second if grouped else bits == 8):
        few = choose_at_once(max(tokens, FEW_TOKENS) if grouped else tokens, blocks, bits=bits)
        found += [] if few is None else [few]
    return found


def _triton(rows: list[int], blocks: int, bits: int, *, splits: bool) -> Iterator[Tiles]:
    for half, row, warps in itertools.product((16, 32, 64, 128), rows, (1, 2, 4, 8)):
        stage = 2 * half * 16 * bits + row * 128
        sums = 2 * half * row // (32 * warps)
        suits = _REGISTERS[0] <= sums <= _REGISTERS[1] and half * row >= 256 * warps
        if suits and _STAGES * stage <= _SHARED_MEMORY:
            yield Tiles(half, row, _STAGES, warps, max(1, 64 // warps))
        # Each warp has blocks of its own.
        splitting = splits and warps > 1 and blocks % warps == 0 and half == 16
        if splitting and _STAGES * warps * stage <= _SHARED_MEMORY:
            yield Tiles(half, row, _STAGES, warps, 64 // warps, split=warps)


def _gluon(rows: list[int], blocks: int) -> Iterator[Tiles]:
    for row, unroll in itertools.product(rows, (1, 2)):
        yield Tiles(128, row, 8, 4, 1, kernel=Kernel.RING, unroll=unroll)
        if blocks % 2 == 0 and row <= MOST_SPLIT_TOKENS:
            yield Tiles(64, row, 8, 4, 2, split=2, kernel=Kernel.RING, unroll=unroll)


def _gluon_dense(tokens: int, blocks: int) -> Iterator[Tiles]:
    for outputs, row in DENSE_TILES:
        if row < 2 * max(tokens, DENSE_TILES[0][1]):
            yield dense_tile(outputs, row, blocks)
