"""Triton kernels of `route`'s choice: the sum of logits that come in pieces, and the best of them.

An expert's place is found by taking the best of those left, K times. Comparing all pairs is a
chain as short, but takes eight times the instructions.

Shapes: T tokens of a tile, E experts, K choices, S splits.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.routing.choose import choose_choice
from fourfold.kernels.routing.groups import RowGroups, choose_tile, most_tiles
from fourfold.kernels.routing.rule import Rule, Spread
from fourfold.kernels.routing.triton_logits import launch_logits

_LOWEST = tl.constexpr(-3.0e38)
_TAKEN = tl.constexpr(-(1 << 31))


@triton.jit
def _sum_parts(parts, token_1T, tokens, e_E1, experts, SPLITS: tl.constexpr):
    """The tokens' logits, added in the order of the splits; zeros outside."""
    inside = (token_1T < tokens) & (e_E1 < experts)
    logits_ET = tl.zeros(inside.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        at = parts + (tl.cast(split * tokens, tl.int64) + token_1T) * experts + e_E1
        logits_ET += tl.load(at, inside, other=0.0)
    return logits_ET


@triton.jit
def _wanted(
    logits_ET,
    scores_ET,
    e_E1,
    bias,
    token_1T,
    seed,
    steps,
    experts,
    BIASED: tl.constexpr,
    SPREAD: tl.constexpr,
    K: tl.constexpr,
):
    """What experts are ranked by: minus infinity for those that the token may not choose."""
    wanted_ET = logits_ET
    if BIASED:
        wanted_ET = scores_ET + tl.load(bias + e_E1, e_E1 < experts, other=0.0)
    # NaN compares with nothing; an expert with it comes last of those that may be chosen.
    wanted_ET = tl.where(wanted_ET > _LOWEST, wanted_ET, _LOWEST)
    barred = e_E1 >= experts
    if SPREAD:
        hashed = (token_1T + seed + tl.load(steps) * 0x9E3779B1) & 0xFFFFFFFF
        hashed = ((hashed ^ (hashed >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
        hashed = ((hashed ^ (hashed >> 15)) * 0xC2B2AE35) & 0xFFFFFFFF
        first_1T = ((hashed * experts) >> 32).to(tl.int32)
        barred |= (e_E1 - first_1T + experts) % experts >= K
    return tl.where(barred, float("-inf"), wanted_ET)


@triton.jit
def _places(wanted_ET, e_E1, K: tl.constexpr):
    """The place of each of a token's K best experts, best first, of equals the first; K for the
    others. In integers, whose maximum over a warp is one instruction."""
    # In the order of the floats, among which a sum that began with 0.0 has left no -0.0.
    bits_ET = wanted_ET.to(tl.int32, bitcast=True)
    left_ET = bits_ET ^ ((bits_ET >> 31) & 0x7FFFFFFF)
    place_ET = tl.full(wanted_ET.shape, K, tl.int32)
    for place in range(K):
        best_ET = left_ET == tl.max(left_ET, 0)[None, :]
        taken_ET = e_E1 == tl.min(tl.where(best_ET, e_E1, 1 << 30), 0)[None, :]
        place_ET = tl.where(taken_ET, place, place_ET)
        left_ET = tl.where(taken_ET, _TAKEN, left_ET)
    return place_ET


@triton.jit
def _choice(
    parts,
    bias,
    seed,
    steps,
    token_1T,
    tokens,
    e_E1,
    experts,
    SPLITS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    SPREAD: tl.constexpr,
    K: tl.constexpr,
):
    """The place of each expert among those that a token chose, K for the others, and its gate."""
    logits_ET = _sum_parts(parts, token_1T, tokens, e_E1, experts, SPLITS)
    if SOFTMAX:
        of_all_ET = tl.where(e_E1 < experts, logits_ET, float("-inf"))
        scores_ET = tl.exp(of_all_ET - tl.max(of_all_ET, 0)[None, :])
        scores_ET /= tl.sum(scores_ET, 0)[None, :]
    else:
        scores_ET = 1 / (1 + tl.exp(-logits_ET))
    wanted_ET = _wanted(
        logits_ET, scores_ET, e_E1, bias, token_1T, seed, steps, experts, BIASED, SPREAD, K
    )
    place_ET = _places(wanted_ET, e_E1, K)
    gates_ET = scores_ET
    if NORMALISE:
        taken_ET = place_ET < K
        if SOFTMAX:
            # Chosen scores over their sum are the softmax of the chosen logits alone.
            of_chosen_ET = tl.where(taken_ET, logits_ET, float("-inf"))
            gates_ET = tl.exp(logits_ET - tl.max(of_chosen_ET, 0)[None, :])
        # Sigmoid scores may all underflow.
        sum_T = tl.sum(tl.where(taken_ET, gates_ET, 0.0), 0)
        gates_ET = gates_ET / tl.maximum(sum_T, 1e-20)[None, :]
    return place_ET, gates_ET


@triton.jit
def _store_choice(gates, chosen, token_1T, tokens, e_E1, place_ET, gates_ET, K: tl.constexpr):
    at_ET = token_1T * K + place_ET
    inside_ET = (place_ET < K) & (token_1T < tokens)
    tl.store(gates + at_ET, gates_ET, inside_ET)
    tl.store(chosen + at_ET, tl.broadcast_to(e_E1.to(tl.int64), at_ET.shape), inside_ET)


# With `experts` specialised, wide loads would lay logits out otherwise than the stores, and half of
# the kernel would be exchanges between threads.
@triton.jit(do_not_specialize=["tokens", "seed", "experts"])
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
    T: tl.constexpr,
    E: tl.constexpr,
    EARLY: tl.constexpr,
):
    """T tokens, each across all threads of a program that mostly is one warp: no barriers."""
    token_1T = (tl.program_id(0).to(tl.int64) * T + tl.arange(0, T))[None, :]
    e_E1 = tl.arange(0, E)[:, None]
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    place_ET, gates_ET = _choice(
        parts, bias, seed, steps, token_1T, tokens, e_E1, experts,
        SPLITS, SOFTMAX, NORMALISE, BIASED, SPREAD, K,
    )  # fmt: skip
    _store_choice(gates, chosen, token_1T, tokens, e_E1, place_ET, gates_ET * scale, K)


@triton.jit(do_not_specialize=["tokens", "seed", "N"])
def _choose_and_group(
    parts,
    bias,
    seed,
    steps,
    gates,
    chosen,
    live,
    order,
    ends,
    tiles,
    tokens,
    experts,
    scale,
    N,
    SPLITS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    SPREAD: tl.constexpr,
    MASKED: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    """All of few tokens in one program, a warp each, which then has all there is to sort. A token
    goes to an expert once at most, so that an expert's rows fit one tile, in the tokens' order."""
    token_1T = tl.arange(0, T)[None, :].to(tl.int64)
    e = tl.arange(0, E)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    place_ET, gates_ET = _choice(
        parts, bias, seed, steps, token_1T, tokens, e[:, None], experts,
        SPLITS, SOFTMAX, NORMALISE, BIASED, SPREAD, K,
    )  # fmt: skip
    _store_choice(gates, chosen, token_1T, tokens, e[:, None], place_ET, gates_ET * scale, K)
    there_1T = token_1T < tokens
    if MASKED:
        there_1T &= tl.load(live + token_1T, there_1T, other=0) != 0
    rows_ET = ((place_ET < K) & there_1T).to(tl.int32)
    size_E = tl.sum(rows_ET, 1)
    end_E = tl.cumsum(size_E, 0)
    start_E = end_E - size_E
    at_ET = start_E[:, None] + tl.cumsum(rows_ET, 1) - rows_ET
    tl.store(order + at_ET, (token_1T * K + place_ET).to(tl.int32), rows_ET != 0)
    tl.store(ends + e, end_E, e < experts)
    used_E = (size_E > 0).to(tl.int32)
    n_E = tl.cumsum(used_E, 0) - used_E
    tl.store(tiles + n_E, e, used_E != 0)
    tl.store(tiles + N + n_E, start_E, used_E != 0)
    tl.store(tiles + 2 * N + n_E, end_E, used_E != 0)
    n = tl.arange(0, BLOCK_N)
    unused = (n >= tl.sum(used_E, 0)) & (n < N)
    tl.store(tiles + n, tl.full([BLOCK_N], -1, tl.int32), unused)
    # Products may look up the rows of tiles that there are not.
    nowhere = tl.zeros([BLOCK_N], tl.int32)
    tl.store(tiles + N + n, nowhere, unused)
    tl.store(tiles + 2 * N + n, nowhere, unused)


def launch_route(
    x_TD: Tensor,
    weight_ED: Tensor,
    rule: Rule,
    bias_E: Tensor | None,
    spread: Spread | None,
) -> tuple[Tensor, Tensor]:
    """`route` on checked arguments, in two launches."""
    if len(x_TD) == 0:
        return _empty_choice(0, rule, x_TD.device)
    scores, settings = _scored(x_TD, weight_ED, rule, bias_E, spread)
    return _launch_choice(scores, settings, len(x_TD), len(weight_ED), rule)


def launch_choose_experts(logits_TE: Tensor, rule: Rule, bias_E: Tensor | None) -> Tensor:
    """`choose_experts` on checked arguments."""
    tokens, experts = logits_TE.shape
    if tokens == 0:
        return _empty_choice(0, rule, logits_TE.device)[1]
    scores = (logits_TE, logits_TE if bias_E is None else bias_E, 0, logits_TE)
    settings = _settings(1, experts, rule, bias_E, None, logits_TE.device)
    return _launch_choice(scores, settings, tokens, experts, rule)[1]


def _launch_choice(
    scores: tuple[Any, ...], settings: dict[str, Any], tokens: int, experts: int, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Gates and experts, [T, K]."""
    gates_TK, experts_TK = _empty_choice(tokens, rule, scores[0].device)
    tile = choose_choice(tokens, settings["E"])
    _choose[(triton.cdiv(tokens, tile.tokens),)](
        *scores,
        gates_TK,
        experts_TK,
        tokens,
        experts,
        rule.scale,
        T=tile.tokens,
        num_warps=tile.warps,
        **settings,
    )
    return gates_TK, experts_TK


def launch_route_and_group(
    x_TD: Tensor,
    weight_ED: Tensor,
    rule: Rule,
    bias_E: Tensor | None,
    spread: Spread | None,
    live_T: Tensor | None,
) -> tuple[Tensor, Tensor, RowGroups]:
    """`route_and_group` of at least one token and so few that an expert's rows fit one tile, in two
    launches."""
    tokens, experts = x_TD.shape[0], weight_ED.shape[0]
    gates_TK, experts_TK = _empty_choice(tokens, rule, x_TD.device)
    rows = experts_TK.numel()
    tile = choose_tile(rows, experts)
    tiles = most_tiles(rows, experts, tile)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x_TD.device)

    groups = RowGroups(empty(rows), empty(experts), tile, empty(3, tiles))
    scores, settings = _scored(x_TD, weight_ED, rule, bias_E, spread)
    together = triton.next_power_of_2(tokens)
    assert together <= tile, (tokens, tile)
    _choose_and_group[(1,)](
        *scores,
        gates_TK,
        experts_TK,
        gates_TK if live_T is None else live_T,
        groups.order_R,
        groups.ends_E,
        groups.tiles_3N,
        tokens,
        experts,
        rule.scale,
        tiles,
        MASKED=live_T is not None,
        T=together,
        BLOCK_N=triton.next_power_of_2(tiles),
        num_warps=together,
        **settings,
    )
    return gates_TK, experts_TK, groups


def _empty_choice(tokens: int, rule: Rule, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (tokens, rule.choices)
    return (
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
    )


def _scored(
    x_TD: Tensor, weight_ED: Tensor, rule: Rule, bias_E: Tensor | None, spread: Spread | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Launches the logits; what a choice among them reads, and what it is compiled with."""
    early = overlaps_launches(x_TD.device)
    options = {"COUNT": spread is not None, "EARLY": early, "launch_pdl": early}
    steps = weight_ED if spread is None else spread.steps
    parts = launch_logits(x_TD, weight_ED, steps, options)
    scores = (
        parts,
        weight_ED if bias_E is None else bias_E,
        0 if spread is None else spread.seed,
        steps,
    )
    settings = _settings(parts.shape[0], len(weight_ED), rule, bias_E, spread, x_TD.device)
    return scores, settings


def _settings(
    splits: int,
    experts: int,
    rule: Rule,
    bias_E: Tensor | None,
    spread: Spread | None,
    device: torch.device,
) -> dict[str, Any]:
    """What a choice among logits in so many pieces is compiled with."""
    early = overlaps_launches(device)
    return {
        "SPLITS": splits,
        "SOFTMAX": rule.score == "softmax",
        "NORMALISE": rule.normalise,
        "BIASED": bias_E is not None,
        "SPREAD": spread is not None,
        "K": rule.choices,
        "E": max(16, triton.next_power_of_2(experts)),
        "EARLY": early,
        "launch_pdl": early,
    }
