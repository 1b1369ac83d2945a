"""Which tiles a product uses, from its shape and the GPU; pure, so that it is tested anywhere."""

from __future__ import annotations

import dataclasses
import enum
import math

_MANY_OUTPUTS = 32768
_NARROW = 4096
_HOPPER_STAGES = {16: 8, 32: 8, 64: 6, 128: 5}
_SHARED_MEMORY = (227 << 10) - 2048  # bytes, less scales and barriers
MOST_SPLIT_TOKENS = 16
"""Of a tile whose input channels the Gluon kernel splits: wider ones have failed on a GPU."""
_PARAMETERS = 2 * 64 * 2  # bytes of a run's group parameters in a block
_RING = 192 << 10  # bytes in the dense Gluon kernel: a kernel in front has shared memory besides
_FEWEST_STAGES = 4  # which its results need on their way out
DENSE_TILES = ((64, 64), (128, 64), (128, 128), (256, 128))
"""Outputs and tokens of the tiles of the dense Gluon kernel, smallest first."""
MOST_DENSE = 1024
"""Tokens for which that kernel was timed."""
FEW_TOKENS = 16
"""Of a tile of the Gluon kernel for few tokens."""
_FEW_ROWS = 256  # of all experts, up to which that kernel was timed and found faster
_AT_ONCE = 64 << 10  # bytes of weights at most that a program asks for at once
_WARP = 2 << 10  # bytes of weights of a block that one of its warps multiplies


class Kernel(enum.Enum):
    """The kernels of products, each in a file of its own."""

    TRITON = "Triton"
    """`triton_gemm`, on any GPU."""
    RING = "Gluon"
    """`gluon_gemm`, on Hopper as all that follow: grouped products, and those of many tokens."""
    DENSE = "dense Gluon"
    """`gluon_dense`: dense products with weights of 8 bits; see `dense_tile`."""
    FEW = "Gluon for few tokens"
    """`gluon_few`; see `choose_at_once`."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut."""

    half: int
    """Output rows of one of a program's two runs; half of its rows where it has no runs."""
    tokens: int
    """Tokens of a program."""
    stages: int
    """Blocks of input channels in flight; 1 where all are (FEW)."""
    warps: int
    programs: int
    """Programs at most on one processor of the GPU; what is left over they do in turns. DENSE and
    FEW have one for each tile."""
    split: int = 1
    """Blocks of input channels that a program multiplies side by side: one in each of its warps
    (TRITON), one in each of its two multiplying groups (RING), or one in each of so many parts of
    its warps (FEW)."""
    kernel: Kernel = Kernel.TRITON
    """RING wants 4 warps, and `half` 128 and 1 program, or 64 and 2 where it splits."""
    unroll: int = 1
    """Blocks at most that a warp group multiplies without a pause (RING)."""


def choose_grouped(
    tokens: int, rows: int, blocks: int, *, second: bool, groups: bool, hopper: bool
) -> Tiles:
    """Tiles for grouped products of `tokens` tokens to a tile.

    Args:
        tokens: rows of a tile of `RowGroups`.
        rows: rows of all experts.
        blocks: blocks of input channels.
        second: whether they are an FFN's second: of rows in sorted order, to their flat places,
            without SwiGLU.
        groups: whether the weight has parameters for groups of input channels.
        hopper: whether the GPU is of that generation (compute capability 9.0).
    """
    if hopper and second and rows <= _FEW_ROWS:
        tiles = choose_at_once(tokens, blocks, bits=4)
        if tiles is not None:
            return tiles
    if hopper and (groups or tokens > 32):
        # Parameters of groups arrive with the weights there; Triton has to wait for them.
        if tokens <= MOST_SPLIT_TOKENS and blocks % 2 == 0:
            # A tile of few tokens is a chain of small waits: shorter chains, and more of them.
            return Tiles(64, tokens, 8, 4, 2, split=2, kernel=Kernel.RING)
        unroll = 2 if groups and tokens > 64 else 1
        return Tiles(128, tokens, _HOPPER_STAGES[tokens], 4, 1, kernel=Kernel.RING, unroll=unroll)
    if tokens <= 16:
        return Tiles(32, tokens, 4, 2, 32)
    if tokens <= 32:
        return Tiles(64, tokens, 4, 4, 32)
    return Tiles(64, tokens, 4, 4, 4 if tokens <= 64 else 2)


def choose_dense(
    tokens: int,
    blocks: int,
    *,
    bits: int,
    outputs: int,
    groups: bool = False,
    hopper: bool,
    processors: int = 132,
) -> Tiles:
    """Tiles for products of `tokens` tokens with one weight of `blocks` blocks of input channels.

    Few tokens and one weight make few tiles, so those are small. `bits` are the weight's, `outputs`
    its rows; `groups` and `hopper` as in `choose_grouped`, `processors` those of the GPU.
    """
    if bits == 8:
        hopper_tiles = None
        if hopper:
            hopper_tiles = _choose_8_bits_hopper(tokens, blocks, outputs, processors)
        return hopper_tiles or _choose_8_bits(tokens, blocks, outputs)
    if tokens <= 16:
        if blocks % 4 == 0 and blocks > 16:
            return Tiles(16, 16, 4, 4, 8, split=4)
        return Tiles(32, 16, 5, 4, 32)
    if tokens <= 32:
        return Tiles(64, 32, 4, 4, 32)
    tile = 64 if tokens <= 512 else 128
    if hopper and tokens > 64:
        unroll = 2 if groups or tile == 64 else 1
        return Tiles(128, tile, _HOPPER_STAGES[tile], 4, 1, kernel=Kernel.RING, unroll=unroll)
    return Tiles(64, tile, 4, 4, 4 if tile == 64 else 2)


def dense_tile(outputs: int, tokens: int, blocks: int) -> Tiles:
    """One of `DENSE_TILES`, of which as many blocks are in flight as fit and as there are."""
    fitting = _RING // ((outputs + tokens) * 128)
    stages = min(fitting, max(blocks, _FEWEST_STAGES))
    return Tiles(outputs // 2, tokens, stages, tokens // 16, 1, kernel=Kernel.DENSE)


def choose_at_once(tokens: int, blocks: int, *, bits: int) -> Tiles | None:
    """Tiles of the Gluon kernel for few tokens, if those and the blocks of input channels are few
    enough; weights of 8 bits are dense ones, those of 4 bits are for an FFN's second product."""
    split = math.gcd(blocks, 8)
    rows = (8 // split) * (_WARP // (16 * bits))
    if tokens > FEW_TOKENS or split == 1 or rows * blocks * 16 * bits > _AT_ONCE:
        return None
    tile = max(8, 1 << (tokens - 1).bit_length())
    return Tiles(rows // 2, tile, 1, 8, 1, split=split, kernel=Kernel.FEW)


def _choose_8_bits_hopper(tokens: int, blocks: int, outputs: int, processors: int) -> Tiles | None:
    """The Gluon kernels' tiles where they are the faster ones."""
    if outputs >= _MANY_OUTPUTS and tokens <= 512:
        return None
    if tokens <= FEW_TOKENS:
        return choose_at_once(tokens, blocks, bits=8)
    # The smallest that are all computed at once.
    for rows, tile in DENSE_TILES if tokens <= MOST_DENSE else ():
        if -(-outputs // rows) * -(-tokens // tile) <= processors:
            return dense_tile(rows, tile, blocks)
    if tokens <= 512:
        return dense_tile(*DENSE_TILES[-1], blocks)
    return Tiles(128, 128, 4, 4, 1, kernel=Kernel.RING)


def _choose_8_bits(tokens: int, blocks: int, outputs: int) -> Tiles:
    if outputs >= _MANY_OUTPUTS or tokens > 512:
        if tokens > 64:
            return Tiles(128, 128, 4, 8, 1)
        return Tiles(64, 16 if tokens <= 16 else 64, 4, 4, 8)
    # As many programs as fill a GPU: the fewer rows there are, the fewer a program has.
    narrow = outputs <= _NARROW
    if tokens > 64:
        return Tiles(32 if narrow else 64, 64, 4, 4, 64)
    tile = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    if narrow:
        return Tiles(16, tile, 5, 2, 64, split=2 if blocks % 2 == 0 else 1)
    return Tiles(16, tile, 5, 1, 64) if tile <= 32 else Tiles(32, tile, 4, 4, 64)


def hopper_stages(tiles: Tiles, itemsize: int, bits: int = 4) -> int:
    """Blocks of weights of so many bits in flight in the Gluon kernel: as many as asked for that
    fit into shared memory beside the results, of `itemsize` bytes each."""
    runs = 2 * tiles.half // 64
    parameters = runs * _PARAMETERS if bits == 4 else 0
    block = runs * 64 * 16 * bits + tiles.tokens * 128 + parameters
    results = 2 * tiles.tokens * 64 * (itemsize + (4 if tiles.split > 1 else 0))
    return min(tiles.stages, (_SHARED_MEMORY // tiles.programs - results) // block)
