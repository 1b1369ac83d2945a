"""How far below the largest logit the filters of `sample` keep tokens: the searches for it.

Distances are compared as the bits of float32, which order as they do, and ranges (low, high] of
them are parted midway between the distances. What adds up to a filter's goal is 1 for each token
(top-k) or its weight (top-p).

Shapes: V vocabulary, T tiles, C chunks, D distances.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.sample.triton_rows import chunk_tokens, chunks_of, tokens_of

LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(0x7F7FFFFF)  # the bits of the largest finite distance
_CUTS = tl.constexpr(8)  # of the distances, in one pass over a row
_BLOCK = tl.constexpr(1024)  # tokens of such a pass at a time
_GATHERED = tl.constexpr(128)  # chunks read again at a time


@triton.jit
def distance(x, top):
    """How far a token is below the largest, as the bits of a float32: they order as it does."""
    return (top - x).to(tl.int32, bitcast=True)


@triton.jit
def weight_at(bits, scale):
    """The weight of a token at a distance; below 2 ** -150, that is none, past the furthest."""
    return tl.exp2(-bits.to(tl.float32, bitcast=True) * scale)


@triton.jit
def _between(low, high):
    """A distance about midway, so that (low, high] falls in two parts; all three as bits."""
    middle = 0.5 * (
        tl.maximum(low, 0).to(tl.float32, bitcast=True) + high.to(tl.float32, bitcast=True)
    )
    return tl.minimum(tl.maximum(middle.to(tl.int32, bitcast=True), low + 1), high - 1)


@triton.jit
def likeliest_chunks(bits_C, guess, furthest, least, most, scale):
    """(within, n): a distance within which n chunks have a token, at most `most` and at least
    `least` unless equals prevent it or there are fewer down to the furthest."""
    low = -1 + 0 * furthest
    inside = 0
    high = furthest
    if tl.sum((bits_C <= furthest).to(tl.int32)) <= most:
        low = furthest
        inside = tl.sum((bits_C <= furthest).to(tl.int32))
    bounded = False
    middle = tl.minimum(guess, furthest - 1)
    while (high - low > 1) & (inside < least):
        n = tl.sum((bits_C <= middle).to(tl.int32))
        fits = n <= most
        low = tl.where(fits, middle, low)
        inside = tl.where(fits, n, inside)
        high = tl.where(fits, high, middle)
        bounded = bounded | (n > most)
        further = 1.25 * middle.to(tl.float32, bitcast=True) + 0.25 / scale
        middle = _between(low, high)
        if not bounded:
            middle = tl.minimum(middle, further.to(tl.int32, bitcast=True))
    return low, inside


@triton.jit
def reach_of(bits, value, low, high, goal):
    """The least distance in (low, high] within which the values add up to `goal`, or one that keeps
    the same tokens; else `high`."""
    low = low + 0 * high
    at_low = -1.0
    at_high = tl.sum(tl.where(bits <= high, value, 0.0))
    while (high - low > 1) & (at_high != goal):
        middle = _between(low, high)
        total = tl.sum(tl.where(bits <= middle, value, 0.0))
        vain = (total == at_low) | (total == at_high)
        enough = total >= goal
        high = tl.where(enough, middle, high)
        at_high = tl.where(enough, total, at_high)
        low = tl.where(enough, low, middle)
        at_low = tl.where(enough, at_low, total)
        if vain:
            # No token between: on to those there are, so that equals end the search.
            left = (bits > low) & (bits <= high)
            high = tl.max(tl.where(left, bits, low + 1))
            low = tl.min(tl.where(left, bits, high)) - 1
    return high


@triton.jit
def gather(
    source,
    top,
    within,
    n,
    chunks,
    near_bits,
    near_off,
    LIMIT: tl.constexpr,
):
    """Writes the tokens of the first n of `chunks` that lie within a distance, in their order: bits
    of distances and tokens. Returns how many there are; no more than LIMIT are written."""
    W = source[7]
    found = 0
    for first in range(0, n, _GATHERED):
        line = first + tl.arange(0, _GATHERED)
        chunk = tl.load(chunks + line, line < n, other=W)
        x = chunks_of(chunk, source)
        bits = distance(x, top)
        hit = (bits <= within).to(tl.int32)
        hits = tl.sum(hit, 1)
        place = (found + tl.cumsum(hits, 0) - hits)[:, None] + tl.cumsum(hit, 1) - hit
        fits = (hit != 0) & (place < LIMIT)
        tl.store(near_bits + place, bits, fits)
        tl.store(near_off + place, chunk_tokens(chunk), fits)
        found += tl.sum(hits)
    return found


@triton.jit
def _totals(
    source,
    top,
    scale,
    weigh,
    wide,
    low,
    high,
):
    """One pass over a row: how many tokens lie within each of D distances that part (low, high],
    and their weight, or again their number; (distances, int32, float32) [D]."""
    V = source[6]
    d = tl.arange(0, _CUTS)
    low_x = tl.maximum(low, 0).to(tl.float32, bitcast=True)
    step = (high.to(tl.float32, bitcast=True) - low_x) / _CUTS
    at_x = step * (d + 1)
    if wide:
        # Nothing is known yet: the largest themselves, then from a quarter of the temperature on.
        at_x = tl.where(d == 0, 0.0, tl.exp2(d.to(tl.float32)) * (0.125 * LOG2_E / scale))
    at_D = tl.maximum((low_x + at_x).to(tl.int32, bitcast=True), low + 1)
    at_D = tl.where(d == _CUTS - 1, high, tl.minimum(at_D, high))
    count = tl.zeros([_CUTS, _BLOCK], tl.int32)
    value = tl.zeros([_CUTS, _BLOCK], tl.float32)
    for first in tl.range(0, V, _BLOCK):
        off = first + tl.arange(0, _BLOCK)
        x = tokens_of(off, source)
        bits = distance(x, top)
        own = tl.where(weigh, weight_at(bits, scale), 1.0)
        near = bits[None, :] <= at_D[:, None]
        count += near.to(tl.int32)
        value += tl.where(near, own[None, :], 0.0)
    return at_D, tl.sum(count, 1), tl.sum(value, 1)


@triton.jit
def search(
    source,
    top,
    scale,
    weigh,
    goal,
    low,
    high,
    scratch,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """`reach_of` by passes over the row: until LIMIT tokens are left in question, which are then
    written to scratch."""
    V = source[6]
    d = tl.arange(0, _CUTS)
    low = low + 0 * high
    wide = True
    before = 0.0
    left = V
    inside = 0
    while (high - low > 1) & (left > LIMIT):
        at_D, count_D, value_D = _totals(source, top, scale, weigh, wide, low, high)
        wide = False
        first = tl.min(tl.where(value_D >= goal, d, _CUTS - 1))
        if first > 0:
            low = tl.sum(tl.where(d == first - 1, at_D, 0))
            inside = tl.sum(tl.where(d == first - 1, count_D, 0))
            before = tl.sum(tl.where(d == first - 1, value_D, 0.0))
        high = tl.sum(tl.where(d == first, at_D, 0))
        left = tl.sum(tl.where(d == first, count_D, 0)) - inside
    if high - low > 1:
        found = 0
        for first in tl.range(0, V, TILE):
            off = first + tl.arange(0, TILE)
            x = tokens_of(off, source)
            bits = distance(x, top)
            hit = ((bits > low) & (bits <= high)).to(tl.int32)
            tl.store(scratch + found + tl.cumsum(hit, 0) - hit, bits, hit != 0)
            found += tl.sum(hit)
        tl.debug_barrier()
        i = tl.arange(0, LIMIT)
        bits = tl.load(scratch + i, i < found, other=FAR + 1)
        value = tl.where(weigh, weight_at(bits, scale), 1.0)
        high = reach_of(bits, value, low, high, goal - before)
    return high


@triton.jit
def tile_weights(
    source,
    T,
    top,
    scale,
    reach,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The weight within the reach in each tile of a row; float32 [T]."""
    t = tl.arange(0, TILES)
    weight_T = tl.zeros([TILES], tl.float32)
    for tile in tl.range(0, T):
        off = tile * TILE + tl.arange(0, TILE)
        x = tokens_of(off, source)
        bits = distance(x, top)
        own = tl.sum(tl.where(bits <= reach, weight_at(bits, scale), 0.0))
        weight_T = tl.where(t == tile, own, weight_T)
    return weight_T
