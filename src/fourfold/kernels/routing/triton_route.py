"""Triton kernels of `route`: logits in pieces, then their sum and the choice.

Rows in 16 bits are multiplied on tensor cores by weights in three parts of 16 bits, which together
hold a float32's digits: products are exact and sums float32, as if computed in float32. Few tokens
leave most of a GPU idle, so input channels are split over programs; parts are added in their order.

Shapes: T tokens of a tile, D input channels of a block, E experts of a block, K choices, S splits.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.dependent_launch import overlaps_launches

if TYPE_CHECKING:
    from fourfold.kernels.routing.route import Rule, Spread

_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _exact_dot(w, rows, sums):
    """`sums + w @ rows` of float32 weights as if computed in float32."""
    if rows.dtype == tl.float32:
        return tl.dot(w, rows, sums, input_precision="ieee")
    high = w.to(rows.dtype)
    rest = w - high.to(tl.float32)
    middle = rest.to(rows.dtype)
    low = (rest - middle.to(tl.float32)).to(rows.dtype)
    sums = tl.dot(low, rows, sums)
    sums = tl.dot(middle, rows, sums)
    return tl.dot(high, rows, sums)


@triton.jit(do_not_specialize=["tokens"])
def _logits_of_few(
    x,
    weight,
    parts,
    steps,
    tokens,
    x_stride,
    channels,
    experts,
    T: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """W * D channels, D of them in each of W warps. Weights are read before the wait."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    e = tl.program_id(1) * E + tl.arange(0, E)
    d_WD = tl.program_id(2) * (W * D) + tl.arange(0, W)[:, None] * D + tl.arange(0, D)[None, :]
    inside_WD = d_WD < channels
    inside_WED = (e < experts)[None, :, None] & inside_WD[:, None, :]
    w_WED = tl.load(weight + e[None, :, None] * channels + d_WD[:, None, :], inside_WED, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if COUNT:
        first_program = tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0
        tl.store(steps, tl.load(steps) + 1, first_program)
    inside_WTD = (t < tokens)[None, :, None] & inside_WD[:, None, :]
    rows = x + t.to(tl.int64)[None, :, None] * x_stride + d_WD[:, None, :]
    rows_WTD = tl.load(rows, inside_WTD, other=0.0)
    sums_WET = _exact_dot(w_WED, tl.permute(rows_WTD, (0, 2, 1)), tl.zeros([W, E, T], tl.float32))
    row_T = tl.program_id(2).to(tl.int64) * tokens + t
    inside_ET = (t < tokens)[None, :] & (e < experts)[:, None]
    tl.store(parts + row_T[None, :] * experts + e[:, None], tl.sum(sums_WET, 0), inside_ET)


@triton.jit(do_not_specialize=["tokens"])
def _logits(
    x,
    weight,
    parts,
    steps,
    tokens,
    x_stride,
    channels,
    experts,
    of_split,
    T: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    COUNT: tl.constexpr,
    EARLY: tl.constexpr,
):
    t = tl.program_id(0) * T + tl.arange(0, T)
    e = tl.program_id(1) * E + tl.arange(0, E)
    first = tl.program_id(2) * of_split
    d = tl.arange(0, D)
    inside_t = (t < tokens)[None, :]
    inside_e = (e < experts)[:, None]
    x_DT = x + t.to(tl.int64)[None, :] * x_stride + d[:, None]
    weight_ED = weight + e[:, None] * channels + d[None, :]
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if COUNT:
        first_program = tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0
        tl.store(steps, tl.load(steps) + 1, first_program)
    sums_ET = tl.zeros([E, T], tl.float32)
    for start in tl.range(first, min(first + of_split, channels), D, num_stages=3):
        there = start + d < channels
        w_ED = tl.load(weight_ED + start, inside_e & there[None, :], other=0.0)
        rows_DT = tl.load(x_DT + start, inside_t & there[:, None], other=0.0)
        sums_ET = _exact_dot(w_ED, rows_DT, sums_ET)
    row_T = tl.program_id(2).to(tl.int64) * tokens + t
    to_ET = parts + row_T[None, :] * experts + e[:, None]
    tl.store(to_ET, sums_ET, inside_t & inside_e)


@triton.jit
def _sum_parts(parts, token, tokens, e, experts, SPLITS: tl.constexpr):
    """A token's logits of the experts e, added in the order of the splits."""
    logits = tl.zeros(e.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        at = parts + (tl.cast(split * tokens, tl.int64) + token) * experts + e
        logits += tl.load(at, e < experts, other=0.0)
    return logits


@triton.jit
def _scores(logits, largest, total, SOFTMAX: tl.constexpr):
    if SOFTMAX:
        return tl.exp(logits - largest) / total
    else:  # noqa: RET505 (what is not chosen is not compiled)
        return 1 / (1 + tl.exp(-logits))


@triton.jit
def _wanted(
    logits,
    scores,
    e,
    bias,
    token,
    seed,
    steps,
    experts,
    BIASED: tl.constexpr,
    SPREAD: tl.constexpr,
    K: tl.constexpr,
):
    """What experts are ranked by: minus infinity for those that the token may not choose."""
    wanted = logits
    if BIASED:
        wanted = scores + tl.load(bias + e, e < experts, other=0.0)
    # NaN compares with nothing; an expert with it comes last of those that may be chosen.
    wanted = tl.where(wanted > _LOWEST, wanted, _LOWEST)
    barred = e >= experts
    if SPREAD:
        hashed = (token + seed + tl.load(steps) * 0x9E3779B1) & 0xFFFFFFFF
        hashed = ((hashed ^ (hashed >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
        hashed = ((hashed ^ (hashed >> 15)) * 0xC2B2AE35) & 0xFFFFFFFF
        first = ((hashed * experts) >> 32).to(tl.int32)
        barred |= (e - first + experts) % experts >= K
    return tl.where(barred, float("-inf"), wanted)


@triton.jit(do_not_specialize=["tokens", "seed"])
def _choose(
    parts,
    bias,
    seed,
    steps,
    gates,
    chosen,
    tokens,
    experts,
    scale,
    SPLITS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    SPREAD: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    J: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token: an expert's place is the number of experts before it."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    logits = _sum_parts(parts, token, tokens, e, experts, SPLITS)
    real = e < experts
    largest = 0.0
    total = 1.0
    if SOFTMAX:
        largest = tl.max(tl.where(real, logits, float("-inf")), 0)
        total = tl.sum(tl.where(real, tl.exp(logits - largest), 0.0), 0)
    scores = _scores(logits, largest, total, SOFTMAX)
    wanted = _wanted(logits, scores, e, bias, token, seed, steps, experts, BIASED, SPREAD, K)
    place = tl.zeros([E], tl.int32)
    for start in range(0, E, J):
        j = start + tl.arange(0, J)
        logits_j = _sum_parts(parts, token, tokens, j, experts, SPLITS)
        scores_j = _scores(logits_j, largest, total, SOFTMAX)
        wanted_j = _wanted(
            logits_j, scores_j, j, bias, token, seed, steps, experts, BIASED, SPREAD, K
        )
        tied = (wanted_j[:, None] == wanted[None, :]) & (j[:, None] < e[None, :])
        place += tl.sum(((wanted_j[:, None] > wanted[None, :]) | tied).to(tl.int32), 0)
    taken = place < K
    gate = scores
    if NORMALISE:
        if SOFTMAX:
            # Chosen scores over their sum are the softmax of the chosen logits alone.
            of_chosen = tl.max(tl.where(taken, logits, float("-inf")), 0)
            gate = tl.exp(logits - of_chosen)
        # Sigmoid scores may all underflow.
        gate = gate / tl.maximum(tl.sum(tl.where(taken, gate, 0.0), 0), 1e-20)
    tl.store(gates + token * K + place, gate * scale, taken)
    tl.store(chosen + token * K + place, e.to(tl.int64), taken)


def _launch_logits(
    x_TD: Tensor, weight_ED: Tensor, steps: Tensor, options: dict[str, bool]
) -> Tensor:
    """Logits in pieces that are to be added, [S, T, E]."""
    (tokens, channels), experts = x_TD.shape, weight_ED.shape[0]

    def empty(splits: int) -> Tensor:
        return torch.empty((splits, tokens, experts), dtype=torch.float32, device=x_TD.device)

    shape = (tokens, x_TD.stride(0), channels, experts)
    if tokens <= 64:
        tile, block, depth = 16, 16, 64
        parts = empty(triton.cdiv(channels, 4 * depth))
        grid = (triton.cdiv(tokens, tile), triton.cdiv(experts, block), parts.shape[0])
        _logits_of_few[grid](
            x_TD, weight_ED, parts, steps, *shape, T=tile, W=4, D=depth, E=block, **options
        )
        return parts
    tile, block, depth = (32, 16, 128) if tokens <= 512 else (64, 128, 64)
    block = min(block, max(16, triton.next_power_of_2(experts)))
    tiles = triton.cdiv(tokens, tile) * triton.cdiv(experts, block)
    splits = max(1, min(8, 256 // tiles, channels // depth))
    of_split = triton.cdiv(triton.cdiv(channels, splits), depth) * depth
    parts = empty(triton.cdiv(channels, of_split))
    grid = (triton.cdiv(tokens, tile), triton.cdiv(experts, block), parts.shape[0])
    _logits[grid](
        x_TD, weight_ED, parts, steps, *shape, of_split, T=tile, D=depth, E=block, **options
    )
    return parts


def launch_route(
    x_TD: Tensor,
    weight_ED: Tensor,
    rule: Rule,
    bias_E: Tensor | None,
    spread: Spread | None,
) -> tuple[Tensor, Tensor]:
    """`route` on checked arguments, in two launches."""
    tokens, experts, device = x_TD.shape[0], weight_ED.shape[0], x_TD.device
    early = overlaps_launches(device)
    overlapped = {"EARLY": early, "launch_pdl": early}
    gates_TK = torch.empty((tokens, rule.choices), dtype=torch.float32, device=device)
    experts_TK = torch.empty((tokens, rule.choices), dtype=torch.int64, device=device)
    if tokens == 0:
        return gates_TK, experts_TK
    counted = {"COUNT": spread is not None, **overlapped}
    steps = weight_ED if spread is None else spread.steps
    parts = _launch_logits(x_TD, weight_ED, steps, counted)
    width = max(16, triton.next_power_of_2(experts))
    _choose[(tokens,)](
        parts,
        weight_ED if bias_E is None else bias_E,
        0 if spread is None else spread.seed,
        steps,
        gates_TK,
        experts_TK,
        tokens,
        experts,
        rule.scale,
        SPLITS=parts.shape[0],
        SOFTMAX=rule.score == "softmax",
        NORMALISE=rule.normalise,
        BIASED=bias_E is not None,
        SPREAD=spread is not None,
        K=rule.choices,
        E=width,
        J=min(width, 16384 // width),
        num_warps=4,
        **overlapped,
    )
    return gates_TK, experts_TK
