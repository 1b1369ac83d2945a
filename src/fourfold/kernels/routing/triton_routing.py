"""Triton kernels of `group_rows` and `combine`.

Shapes: R rows, E experts, C chunks of rows, N tiles.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.routing.groups import RowGroups, most_tiles

_NOBODY = tl.constexpr(1 << 30)
_FEW = 4096  # rows among which every expert's program looks for its own
_CHUNK_OF_FEW = 2048
_CHUNK = 256
_PLACED = 32  # rows of a chunk that are placed at a time


@triton.jit
def _experts_of(experts, live, rows, R, CHOICES: tl.constexpr):
    """The experts of flat rows; nobody for rows past the last and, where CHOICES is given, for
    those of tokens that are not live."""
    inside = rows < R
    if CHOICES > 0:
        inside &= tl.load(live + rows // CHOICES, inside, other=0) != 0
    return tl.load(experts + rows, inside, other=_NOBODY).to(tl.int32)


@triton.jit
def _count_experts(expert_R, BLOCK_E: tl.constexpr):
    there = expert_R != _NOBODY
    return tl.histogram(tl.where(there, expert_R, 0), BLOCK_E, mask=there)


@triton.jit
def _write_tiles(tiles, sizes_E, first_n, N, TILE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles first_n .. first_n + BLOCK_N - 1, from every expert's number of rows."""
    e = tl.arange(0, sizes_E.shape[0])
    tiles_E = (sizes_E + TILE - 1) // TILE
    last_E = tl.cumsum(tiles_E, 0)
    n = first_n + tl.arange(0, BLOCK_N)
    past_EN = last_E[:, None] <= n[None, :]
    expert = tl.sum(past_EN.to(tl.int32), 0)
    place = n - tl.sum(tl.where(past_EN, tiles_E[:, None], 0), 0)
    start = tl.sum(tl.where(past_EN, sizes_E[:, None], 0), 0)
    size = tl.sum(tl.where(e[:, None] == expert[None, :], sizes_E[:, None], 0), 0)
    tl.store(tiles + n, tl.where(n < tl.sum(tiles_E, 0), expert, -1), n < N)
    tl.store(tiles + N + n, start + place * TILE, n < N)
    tl.store(tiles + 2 * N + n, start + size, n < N)


@triton.jit
def _list_tiles(tiles, sizes_E, N, TILE: tl.constexpr):
    """All tiles, from every expert's number of rows; the last of them may not be needed."""
    e = tl.arange(0, sizes_E.shape[0])
    end_E = tl.cumsum(sizes_E, 0)
    tiles_E = (sizes_E + TILE - 1) // TILE
    n_E = tl.cumsum(tiles_E, 0) - tiles_E
    for place in range(tl.max(tiles_E, 0)):
        there_E = place < tiles_E
        tl.store(tiles + n_E + place, e, there_E)
        tl.store(tiles + N + n_E + place, end_E - sizes_E + place * TILE, there_E)
        tl.store(tiles + 2 * N + n_E + place, end_E, there_E)
    # Products may look up the rows of tiles that there are not.
    nowhere = tl.zeros(e.shape, tl.int32)
    for first in range(tl.sum(tiles_E, 0), N, sizes_E.shape[0]):
        n = first + e
        tl.store(tiles + n, nowhere - 1, n < N)
        tl.store(tiles + N + n, nowhere, n < N)
        tl.store(tiles + 2 * N + n, nowhere, n < N)


@triton.jit(do_not_specialize=["R", "N"])
def _group_few(
    experts,
    live,
    order,
    ends,
    tiles,
    R,
    E,
    N,
    CHOICES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program for each expert, which finds its rows among all; and one that lists the tiles."""
    expert = tl.program_id(0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if expert == E:
        sizes_E = tl.zeros([BLOCK_E], tl.int32)
        for first in range(0, R, CHUNK):
            expert_j = _experts_of(experts, live, first + tl.arange(0, CHUNK), R, CHOICES)
            sizes_E += _count_experts(expert_j, BLOCK_E)
        _list_tiles(tiles, sizes_E, N, TILE)
    else:
        start = 0
        for first in range(0, R, CHUNK):
            expert_j = _experts_of(experts, live, first + tl.arange(0, CHUNK), R, CHOICES)
            start += tl.sum((expert_j < expert).to(tl.int32), 0)
        for first in range(0, R, CHUNK):
            j = first + tl.arange(0, CHUNK)
            mine = _experts_of(experts, live, j, R, CHOICES) == expert
            here = mine.to(tl.int32)
            tl.store(order + start + tl.cumsum(here, 0) - 1, j, mine)
            start += tl.sum(here, 0)
        tl.store(ends + expert, start)


@triton.jit(do_not_specialize=["R"])
def _count(
    experts,
    live,
    counts,
    R,
    E,
    CHOICES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    e = tl.arange(0, BLOCK_E)
    counts_E = _count_experts(_experts_of(experts, live, i, R, CHOICES), BLOCK_E)
    tl.store(counts + tl.program_id(0) * E + e, counts_E, e < E)


@triton.jit(do_not_specialize=["C"])
def _sum_chunks(
    counts, totals, C, E, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, EARLY: tl.constexpr
):
    """Counts to the rows of an expert in the chunks before; and those in all chunks."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before_E = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < C)[:, None] & (e < E)[None, :]
        places = counts + c[:, None] * E + e[None, :]
        counts_CE = tl.load(places, inside, other=0)
        tl.store(places, before_E[None, :] + tl.cumsum(counts_CE, 0) - counts_CE, inside)
        before_E += tl.sum(counts_CE, 0)
    tl.store(totals + e, before_E, e < E)


@triton.jit(do_not_specialize=["R", "N", "C"])
def _place(
    experts,
    live,
    order,
    ends,
    tiles,
    before,
    totals,
    R,
    E,
    N,
    C,
    CHOICES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACED: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    sizes_E = tl.load(totals + e, e < E, other=0)
    if chunk >= C:
        _write_tiles(tiles, sizes_E, (chunk - C) * BLOCK_N, N, TILE, BLOCK_N)
        tl.store(ends + e, tl.cumsum(sizes_E, 0), (e < E) & (chunk == C))
    else:
        j = chunk * CHUNK + tl.arange(0, CHUNK)
        expert_j = _experts_of(experts, live, j, R, CHOICES)
        for part in range(0, CHUNK, PLACED):
            i = chunk * CHUNK + part + tl.arange(0, PLACED)
            expert_i = _experts_of(experts, live, i, R, CHOICES)
            there = expert_i != _NOBODY
            below = tl.where(e[:, None] < expert_i[None, :], sizes_E[:, None], 0)
            same = (expert_j[:, None] == expert_i[None, :]) & (j[:, None] < i[None, :])
            place = tl.load(before + chunk * E + expert_i, there, other=0)
            place += tl.sum(below, 0) + tl.sum(same.to(tl.int32), 0)
            tl.store(order + place, i, there)


@triton.jit
def _combine(
    out,
    gates,
    live,
    y,
    D,
    K: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    there = True
    if MASKED:
        there = tl.load(live + token) != 0
    inside = (d < D) & there
    for k in tl.static_range(K):
        gate = tl.load(gates + token * K + k, there, other=0.0).to(tl.float32)
        part_D = tl.load(out + (token * K + k) * D + d, inside, other=0.0).to(tl.float32)
        sum_D = tl.fma(tl.broadcast_to(gate, sum_D.shape), part_D, sum_D)
    tl.store(y + token * D + d, sum_D.to(y.dtype.element_ty), d < D)


def launch_group_rows(
    experts_TK: Tensor, experts: int, tile: int, live_T: Tensor | None = None
) -> RowGroups:
    """`group_rows` in one launch for few rows, in three for many."""
    rows = experts_TK.numel()
    routing = (experts_TK, experts_TK if live_T is None else live_T)
    choices = 0 if live_T is None else experts_TK.shape[1]
    tiles = most_tiles(rows, experts, tile)

    def empty(*shape):
        return torch.empty(shape, dtype=torch.int32, device=experts_TK.device)

    groups = RowGroups(empty(rows), empty(experts), tile, empty(3, tiles))
    block = max(16, triton.next_power_of_2(experts))
    sizes = {"CHOICES": choices, "TILE": tile, "BLOCK_E": block, **_overlapped(experts_TK)}
    results = (groups.order_R, groups.ends_E, groups.tiles_3N)
    if rows <= _FEW:
        _group_few[(experts + 1,)](
            *routing, *results, rows, experts, tiles, CHUNK=_CHUNK_OF_FEW, num_warps=8, **sizes
        )
        return groups
    block_n = max(16, 8192 // block)
    chunks = triton.cdiv(rows, _CHUNK)
    counts_CE, totals_E = empty(chunks, experts), empty(experts)
    _count[(chunks,)](
        *routing,
        counts_CE,
        rows,
        experts,
        CHOICES=choices,
        CHUNK=_CHUNK,
        BLOCK_E=block,
        **_overlapped(experts_TK),
    )
    _sum_chunks[(triton.cdiv(experts, 4),)](
        counts_CE,
        totals_E,
        chunks,
        experts,
        BLOCK_C=512,
        BLOCK_E=4,
        **_overlapped(experts_TK),
    )
    _place[(chunks + triton.cdiv(tiles, block_n),)](
        *routing,
        *results,
        counts_CE,
        totals_E,
        rows,
        experts,
        tiles,
        chunks,
        BLOCK_N=block_n,
        CHUNK=_CHUNK,
        PLACED=_PLACED,
        **sizes,
    )
    return groups


def launch_combine(
    out_TKD: Tensor, gates_TK: Tensor, out_dtype: torch.dtype, live_T: Tensor | None = None
) -> Tensor:
    """The weighted sum, a program for every token and 2048 channels."""
    tokens, choices, width = out_TKD.shape
    y_TD = torch.empty((tokens, width), dtype=out_dtype, device=out_TKD.device)
    block = min(2048, triton.next_power_of_2(width))
    _combine[(tokens, triton.cdiv(width, block))](
        out_TKD,
        gates_TK,
        gates_TK if live_T is None else live_T,
        y_TD,
        width,
        K=choices,
        MASKED=live_T is not None,
        BLOCK_D=block,
        num_warps=max(1, min(8, block // 256)),
        **_overlapped(out_TKD),
    )
    return y_TD


def _overlapped(tensor: Tensor) -> dict[str, bool]:
    early = overlaps_launches(tensor.device)
    return {"EARLY": early, "launch_pdl": early}
