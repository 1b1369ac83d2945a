"""The verbs of routing in plain PyTorch: the oracle of the kernels, and what a CPU runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels.routing.groups import RowGroups, choose_tile, most_tiles
from fourfold.kernels.routing.rule import Rule, Spread

# Sigmoid scores may all underflow; their sum must not be divided by as zero.
_SMALLEST = 1e-20


def group_rows(
    experts_TK: Tensor,
    experts: int,
    *,
    tile: int | None = None,
    live_T: Tensor | None = None,
) -> RowGroups:
    """See `fourfold.kernels.routing.group_rows`."""
    flat_R = experts_TK.flatten()
    tile = tile or choose_tile(flat_R.numel(), experts)
    if live_T is not None:
        flat_R = torch.where(live_T[:, None] != 0, experts_TK, experts).flatten()
    sizes_E = torch.bincount(flat_R, minlength=experts)[:experts]
    ends_E = sizes_E.cumsum(0)
    tiles = [
        (expert, first, end)
        for expert, (size, end) in enumerate(zip(sizes_E.tolist(), ends_E.tolist(), strict=True))
        for first in range(end - size, end, tile)
    ]
    tiles_3N = flat_R.new_zeros((3, most_tiles(flat_R.numel(), experts, tile)), dtype=torch.int32)
    tiles_3N[0] = -1
    if tiles:
        tiles_3N[:, : len(tiles)] = torch.tensor(tiles, dtype=torch.int32).T
    return RowGroups(
        flat_R.argsort(stable=True).to(torch.int32), ends_E.to(torch.int32), tile, tiles_3N
    )


def combine(
    out_TKD: Tensor,
    gates_TK: Tensor,
    *,
    out_dtype: torch.dtype,
    live_T: Tensor | None = None,
) -> Tensor:
    """See `fourfold.kernels.routing.combine`."""
    y_TD = (out_TKD.double() * gates_TK.double()[..., None]).sum(1).to(out_dtype)
    return y_TD if live_T is None else y_TD.masked_fill(live_T[:, None] == 0, 0)


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    rule: Rule,
    *,
    bias_E: Tensor | None = None,
    spread: Spread | None = None,
) -> tuple[Tensor, Tensor]:
    """See `fourfold.kernels.routing.route`."""
    logits_TE = F.linear(x_TD.float(), weight_ED)
    experts_TK = choose_experts(logits_TE, rule, bias_E=bias_E, spread=spread)
    if rule.score == "softmax" and rule.normalise:
        # The chosen scores over their sum: the softmax of the chosen logits alone.
        return logits_TE.gather(-1, experts_TK).softmax(-1) * rule.scale, experts_TK
    gates_TK = _scores(logits_TE, rule).gather(-1, experts_TK)
    if rule.normalise:
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True).clamp_min(_SMALLEST)
    return gates_TK * rule.scale, experts_TK


def choose_experts(
    logits_TE: Tensor,
    rule: Rule,
    *,
    bias_E: Tensor | None = None,
    spread: Spread | None = None,
) -> Tensor:
    """See `fourfold.kernels.routing.choose_experts`."""
    # Scores may underflow; the order of logits is that of the scores.
    wanted_TE = logits_TE if bias_E is None else _scores(logits_TE, rule) + bias_E
    if spread is not None:
        spread.steps.add_(1)
        wanted_TE = wanted_TE.masked_fill(_apart(logits_TE, rule, spread), -torch.inf)
    order_TE = wanted_TE.sort(dim=-1, descending=True, stable=True).indices
    return order_TE[:, : rule.choices].contiguous()


def _scores(logits_TE: Tensor, rule: Rule) -> Tensor:
    return logits_TE.softmax(-1) if rule.score == "softmax" else logits_TE.sigmoid()


def _apart(logits_TE: Tensor, rule: Rule, spread: Spread) -> Tensor:
    """The experts that each row may not choose, bool [T, E]."""
    tokens, experts = logits_TE.shape
    device = logits_TE.device
    row_T = torch.arange(tokens, device=device)
    hash_T = (row_T + spread.seed + spread.steps * 0x9E3779B1) & 0xFFFFFFFF
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        hash_T = ((hash_T ^ (hash_T >> 15)) * multiplier) & 0xFFFFFFFF
    first_T = (hash_T * experts) >> 32
    return (torch.arange(experts, device=device) - first_T[:, None]) % experts >= rule.choices
