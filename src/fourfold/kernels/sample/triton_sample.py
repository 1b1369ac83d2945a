"""Triton kernels of `sample`: one pass over the logits, then one small program a row.

`_scan` reads a tile of a row and leaves its largest logit and its weight, and the largest logit of
each chunk of 32 tokens. `_draw` reads the chunks that have the largest again: they hold every token
down to some distance, mostly all that the filters can keep. It finds the filters' reach among them
by bisection over the bits of distances, and draws: a chunk (or tile) first, then a token of it.
Where the chunks do not hold enough, `_draw` goes over its row until it has the reach; the host
never waits.

Nothing depends on the order in which programs run or on other rows, so the result is the same in
every run and in every batch.

Shapes: S rows, V vocabulary, T tiles, C chunks, L listed chunks, D distances.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.sample.choose import Cut, power_of_two
from fourfold.kernels.sample.params import SLOT_WORD
from fourfold.kernels.sample.tables import TokenTables
from fourfold.kernels.sample.triton_reach import (
    FAR,
    LOG2_E,
    distance,
    gather,
    likeliest_chunks,
    reach_of,
    search,
    tile_weights,
    weight_at,
)
from fourfold.kernels.sample.triton_rows import (
    COLD,
    INFINITY,
    TOKENS_OF_A_CHUNK,
    biases,
    chunk_logits,
    chunk_tokens,
    is_adjusted,
    is_biased,
    is_filtered,
    is_reported,
    number,
    penalise,
    penalties_of,
    tallies,
    tokens_of,
    touched_chunks,
    uniform,
    word,
)

_SLOT_WORD = tl.constexpr(SLOT_WORD)
_ONE = tl.constexpr(float(1 << 40))  # of a weight as an integer
_STATS = tl.constexpr(4)  # of a tile: maximum and weight, adjusted and not
_FURTHEST = tl.constexpr(160.0)  # in powers of two: the weight of a token that far is 0
_REGISTERS = 128  # of a thread of `_draw`, so that two rows are drawn on an SM at a time


@triton.jit
def _finite(top):
    """0 in place of -inf, which would make weights of -inf - -inf."""
    return tl.where(top == -INFINITY, 0.0, top)


@triton.jit
def _scan(
    logits,
    stride,
    rows,
    tally,
    words,
    bias,
    stats,
    peaks,
    V,
    W,
    T,
    TILE: tl.constexpr,
    HAS_TABLES: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1)
    base = logits + row.to(tl.int64) * stride
    source = (base, rows, row, tally, words, bias, V, W)
    chunk = tile * (TILE // TOKENS_OF_A_CHUNK) + tl.arange(0, TILE // TOKENS_OF_A_CHUNK)
    x = chunk_logits(base, chunk, V)
    # All that has to be waited for is asked for first.
    temperature = number(rows, row, 0)
    filtered = is_filtered(rows, row, V)
    reported = is_reported(rows, row)
    changed = (temperature != 1.0) | (not reported)
    if HAS_TABLES:
        adjusted = is_adjusted(rows, row)
        changed = changed | adjusted
        penalties = penalties_of(rows, row)
        said = tl.zeros_like(x)
        if adjusted:
            said = tallies(chunk_tokens(chunk), touched_chunks(chunk, source), source)
    stat = stats + row * _STATS * T + tile
    peak = tl.max(x, 1)
    top = tl.max(peak, 0)
    total = 0.0
    if reported:
        total = tl.sum(tl.exp2((x - _finite(top)) * LOG2_E))
        tl.store(stat + 2 * T, top)
        tl.store(stat + 3 * T, total)
    if HAS_TABLES:  # noqa: SIM102 (the outer is decided when compiled)
        if adjusted:
            x = penalise(x, said, penalties)
            if is_biased(rows, row):
                x += biases(chunk_tokens(chunk), touched_chunks(chunk, source), source)
            peak = tl.max(x, 1)
            top = tl.max(peak, 0)
    if changed & (temperature >= COLD):
        total = tl.sum(tl.exp2((x - _finite(top)) * (LOG2_E / temperature)))
    tl.store(stat, top)
    tl.store(stat + T, total)
    if filtered:
        tl.store(peaks + row * W + chunk, peak, chunk < W)


@triton.jit
def _whole(weight):
    """Weights up to 1 as integers, whose sums are exact in any order."""
    return (weight * _ONE).to(tl.int64)


@triton.jit
def _goal(share, total):
    return tl.minimum((share * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _place(whole_N, goal):
    """The first of N at which the sum passes the goal."""
    return tl.sum((tl.cumsum(whole_N, 0) <= goal).to(tl.int32))


@triton.jit
def _draw(
    logits,
    stride,
    rows,
    tally,
    words,
    bias,
    stats,
    peaks,
    V,
    W,
    T,
    lists,
    tokens,
    logprobs,
    kept,
    KEEPS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LISTED: tl.constexpr,
    LIMIT: tl.constexpr,
):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    source = (base, rows, row, tally, words, bias, V, W)
    t = tl.arange(0, TILES)
    stat = stats + row * _STATS * T + t
    top_T = tl.load(stat, t < T, other=-INFINITY)
    total_T = tl.load(stat + T, t < T, other=0.0)
    top = tl.max(top_T)
    temperature = number(rows, row, 0)
    scale = LOG2_E / tl.maximum(temperature, COLD)
    u = uniform(rows, row)
    weight_T = total_T * tl.exp2((top_T - _finite(top)) * scale)
    reach = FAR
    is_listed = False
    token = 0
    if (temperature < COLD) | (top == -INFINITY):
        # The first of those at no distance.
        u = u * 0.0
        reach = 0
        weight_T = (top_T == top).to(tl.float32)
    elif is_filtered(rows, row, V):
        k = word(rows, row, 1)
        top_p = number(rows, row, 2)
        by_k = (k > 0) & (k < V)
        by_p = top_p < 1.0
        # What is further has no weight, or is cut by min-p: no filter needs to tell it apart.
        furthest = tl.minimum(_FURTHEST / scale, 1e38).to(tl.int32, bitcast=True)
        reach = tl.minimum(word(rows, row, 3), furthest)
        if not (by_k & by_p):
            furthest = reach
        c = tl.arange(0, CHUNKS)
        bits_C = distance(tl.load(peaks + row * W + c, c < W, other=-INFINITY), top)
        guess = distance(tl.min(tl.where(t < T, top_T, top)), top)
        least = tl.where(by_k, tl.minimum(k, LISTED), LISTED // 2)
        most = tl.where(by_k, tl.minimum(2 * least + 64, LISTED), LISTED)
        within, n = likeliest_chunks(bits_C, guess, furthest, least, most, scale)
        near_C = (bits_C <= within).to(tl.int32)
        near_bits = lists + row.to(tl.int64) * (LISTED + 2 * LIMIT)
        near_off = near_bits + LIMIT
        chunks = near_off + LIMIT
        tl.store(chunks + tl.cumsum(near_C, 0) - near_C, c, near_C != 0)
        tl.debug_barrier()
        found = gather(source, top, within, n, chunks, near_bits, near_off, LIMIT)
        tl.debug_barrier()
        m = tl.arange(0, LIMIT)
        bits = tl.load(near_bits + m, m < found, other=FAR + 1)
        weight = weight_at(bits, scale)
        full = tl.sum(weight_T)
        enough = by_k & (found >= k)
        if by_p & (not by_k):
            enough = (n > 0) & (tl.sum(weight) >= top_p * full)
        is_listed = (found <= LIMIT) & (enough | (within == furthest))
        if is_listed:
            last = within
            if by_k:
                last = reach_of(bits, (bits <= FAR).to(tl.float32), -1, last, k)
                weight = tl.where(bits <= last, weight, 0.0)
                full = tl.sum(weight)
            if by_p:
                last = reach_of(bits, weight, -1, last, top_p * full)
            reach = tl.minimum(reach, last)
            whole = _whole(tl.where(bits <= reach, weight, 0.0))
            place = _place(whole, _goal(u, tl.sum(whole)))
            # Of logits that are no numbers nothing is listed.
            token = tl.load(near_off + place, place < found, other=0)
        else:
            last = furthest
            for turn in range(0, 2):
                weigh = turn == 1
                if (weigh & by_p) | ((not weigh) & by_k):
                    goal = tl.where(weigh, top_p * tl.sum(weight_T), k.to(tl.float32))
                    last = search(source, top, scale, weigh, goal, -1, last, near_bits, TILE, LIMIT)
                if weigh:
                    last = tl.minimum(last, reach)
                if weigh | by_k:
                    weight_T = tile_weights(source, T, top, scale, last, TILE, TILES)
            reach = last
    if not is_listed:
        # The tile: the first with weight at which the sum passes u of all.
        exact_T = weight_T.to(tl.float64)
        target = u * tl.sum(exact_T)
        passed = (tl.cumsum(exact_T, 0) > target) & (exact_T > 0)
        tile = tl.min(tl.where(passed, t, TILES))
        tile = tl.where(tile == TILES, tl.max(tl.where(exact_T > 0, t, 0)), tile)
        before = tl.sum(tl.where(t < tile, exact_T, 0.0))
        own = tl.sum(tl.where(t == tile, exact_T, 0.0))
        share = tl.minimum(tl.maximum((target - before) / own, 0.0), 1.0)
        # Weights beside the tile's own largest, lest all of them vanish.
        tile_top = tl.max(tl.where(t == tile, top_T, -INFINITY))
        off_N = tile * TILE + tl.arange(0, TILE)
        x_N = tokens_of(off_N, source)
        kept_N = distance(x_N, top) <= reach
        whole_N = _whole(tl.where(kept_N, tl.exp2((x_N - tile_top) * scale), 0.0))
        token = tile * TILE + _place(whole_N, _goal(share, tl.sum(whole_N)))
    token = tl.minimum(token, V - 1)
    tl.store(tokens + row, token.to(tl.int64))
    if KEEPS:
        tl.store(kept + word(rows, row, _SLOT_WORD), token.to(tl.int64))
    logprob = float("nan")
    if is_reported(rows, row):
        top_T = tl.load(stat + 2 * T, t < T, other=-INFINITY)
        total_T = tl.load(stat + 3 * T, t < T, other=0.0)
        top = tl.max(top_T)
        total = tl.sum(total_T * tl.exp2((top_T - _finite(top)) * LOG2_E))
        logprob = tl.load(base + token).to(tl.float32) - top - tl.log(total)
    tl.store(logprobs + row, logprob)


def launch(
    logits_SV: Tensor,
    packed_SF: Tensor,
    tables: TokenTables | None,
    cut: Cut,
    tokens_S: Tensor,
    logprobs_S: Tensor,
    last_N: Tensor | None,
) -> None:
    """Fills `tokens_S` and `logprobs_S`, and of `last_N` the slots of these rows."""
    rows, vocabulary = logits_SV.shape
    assert rows * cut.chunks < 2**31, (rows, cut)

    def scratch(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_SV.device)

    stats = scratch(rows, _STATS.value, cut.tiles, dtype=torch.float32)
    shared = (
        logits_SV,
        logits_SV.stride(0),
        packed_SF,
        *_tables(tables, stats, packed_SF),
        stats,
        scratch(rows, cut.chunks, dtype=torch.float32),
        vocabulary,
        cut.chunks,
        cut.tiles,
    )
    has_tables = tables is not None
    _scan[(cut.tiles, rows)](
        *shared, TILE=cut.tile, HAS_TABLES=has_tables, num_warps=cut.scan_warps
    )
    _draw[(rows,)](
        *shared,
        scratch(rows, cut.listed + 2 * cut.limit, dtype=torch.int32),
        tokens_S,
        logprobs_S,
        tokens_S if last_N is None else last_N,
        KEEPS=last_N is not None,
        TILE=cut.tile,
        TILES=power_of_two(cut.tiles),
        CHUNKS=power_of_two(cut.chunks),
        LISTED=cut.listed,
        LIMIT=cut.limit,
        num_warps=cut.draw_warps,
        maxnreg=_REGISTERS,
    )


def _tables(
    tables: TokenTables | None, floats: Tensor, integers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tallies, bitmap and biases; tensors of their types that no row reads where there are none."""
    if tables is None:
        return floats, integers, floats
    bias = floats if tables.bias_NV is None else tables.bias_NV
    return tables.tally_NV, tables.touched_NW, bias
