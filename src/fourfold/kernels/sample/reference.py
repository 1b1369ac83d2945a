"""`sample` in plain PyTorch: the oracle of the kernels, and what a CPU runs.

Only what some row of the batch asks for is computed: greedy rows cost one argmax.

Shapes: S rows, V vocabulary, B blocks of N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.sample.params import COLDEST, SampleParams
from fourfold.kernels.sample.tables import TokenTables, seen

# Top-p looks at this many likeliest tokens first; only a flatter distribution sorts them all.
_NUCLEUS = 1024
# Tokens whose weights are added up before one of them is drawn.
_BLOCK = 1024


def sample(logits_SV: Tensor, params: SampleParams, tables: TokenTables | None) -> Tensor:
    """The tokens of `fourfold.kernels.sample.sample`, int64 [S]."""
    adjusted_SV = _adjust(logits_SV.float(), params, tables)
    drawn_S = params.temperature >= COLDEST
    if not bool(drawn_S.any()):
        return adjusted_SV.argmax(-1)
    if bool(drawn_S.all()):
        return _draw(adjusted_SV, params)
    tokens_S = adjusted_SV.argmax(-1)
    tokens_S[drawn_S] = _draw(adjusted_SV[drawn_S], SampleParams(params.packed_SF[drawn_S]))
    return tokens_S


def logprobs(logits_SV: Tensor, params: SampleParams, tokens_S: Tensor) -> Tensor:
    """log softmax(logits) at the tokens of rows that report it, else nan; float32 [S]."""
    reported_S = params.reported
    logprobs_S = torch.full_like(tokens_S, torch.nan, dtype=torch.float32)
    if bool(reported_S.any()):
        chosen_SV = logits_SV[reported_S].float()
        token_S1 = tokens_S[reported_S, None]
        logprobs_S[reported_S] = chosen_SV.gather(-1, token_S1)[:, 0] - chosen_SV.logsumexp(-1)
    return logprobs_S


def _adjust(logits_SV: Tensor, params: SampleParams, tables: TokenTables | None) -> Tensor:
    """Repetition, then frequency and presence penalties, then biases, of the rows that ask."""
    adjusted_S = params.adjusted
    if tables is None or not bool(adjusted_S.any()):
        return logits_SV
    slots = params.slot[adjusted_S].long()
    repetition, presence, frequency = params.penalties[adjusted_S, :, None].unbind(1)
    tally = tables.tally_NV[slots]
    count = tally.abs()
    chosen = logits_SV[adjusted_S]
    repeated = chosen * torch.where(chosen > 0, 1 / repetition, repetition)
    chosen = torch.where(seen(tally), repeated, chosen)
    chosen -= count * frequency
    chosen -= (count > 0) * presence
    if tables.bias_NV is not None:
        chosen += tables.bias_NV[slots] * params.biased[adjusted_S, None]
    logits_SV = logits_SV.clone()
    logits_SV[adjusted_S] = chosen
    return logits_SV


def _draw(adjusted_SV: Tensor, params: SampleParams) -> Tensor:
    rows, vocabulary = adjusted_SV.shape
    below_SV = adjusted_SV.amax(-1, keepdim=True) - adjusted_SV
    weight_SBN = below_SV.new_zeros((rows, -(-vocabulary // _BLOCK), _BLOCK))
    weight_SV = weight_SBN.view(rows, -1)[:, :vocabulary]
    torch.mul(below_SV, -1 / params.temperature[:, None], out=weight_SV).exp_()
    reach_S1 = _reach(below_SV, weight_SV, params)
    if bool((reach_S1 < torch.inf).any()):
        weight_SV.masked_fill_(below_SV > reach_S1, 0.0)
    # A block of the vocabulary first, then a token of it: most of the sum needs no prefixes.
    block_S1, share_S1 = _place(weight_SBN.sum(-1), params.uniform[:, None])
    weight_SN = weight_SBN[torch.arange(rows, device=block_S1.device), block_S1[:, 0]]
    token_S1, _ = _place(weight_SN, share_S1)
    return (block_S1 * _BLOCK + token_S1).squeeze(-1).clamp_max_(vocabulary - 1)


def _place(weight_SN: Tensor, share_S1: Tensor) -> tuple[Tensor, Tensor]:
    """The first place at which the sum of the weights passes a share of all; int64 [S, 1]. And the
    share of that place's own weight at which it does."""
    weight_SN = weight_SN.double()
    sum_SN = weight_SN.cumsum(-1)
    total_S1 = sum_SN[:, -1:]
    # A product may round up to the total itself.
    goal_S1 = (share_S1 * total_S1).minimum(total_S1.nextafter(torch.zeros_like(total_S1)))
    place_S1 = torch.searchsorted(sum_SN, goal_S1, right=True).clamp_max_(weight_SN.shape[-1] - 1)
    own_S1 = weight_SN.gather(-1, place_S1)
    before_S1 = sum_SN.gather(-1, place_S1) - own_S1
    return place_S1, ((goal_S1 - before_S1) / own_S1).clamp_(0.0, 1.0)


def _reach(below_SV: Tensor, weight_SV: Tensor, params: SampleParams) -> Tensor:
    """How far below the largest logit tokens are kept; [S, 1]."""
    vocabulary = below_SV.shape[-1]
    reach_S1 = params.reach[:, None]
    top_k_S1 = params.top_k[:, None].long()
    some_S1 = (top_k_S1 > 0) & (top_k_S1 < vocabulary)
    if bool(some_S1.any()):
        width = int(torch.where(some_S1, top_k_S1, 1).max())
        nearest = below_SV.topk(width, dim=-1, largest=False).values
        last = nearest.gather(-1, (top_k_S1 - 1).clamp(0, width - 1))
        top_k_reach_S1 = last.masked_fill(~some_S1, torch.inf)
        kept_SV = weight_SV.masked_fill(below_SV > top_k_reach_S1, 0.0)
        reach_S1 = reach_S1.minimum(top_k_reach_S1)
    else:
        kept_SV = weight_SV
    if bool((params.top_p < 1).any()):
        reach_S1 = reach_S1.minimum(_nucleus(below_SV, kept_SV, params.top_p[:, None]))
    return reach_S1


def _nucleus(below_SV: Tensor, kept_SV: Tensor, top_p_S1: Tensor) -> Tensor:
    """The distance of the last token of the smallest set that holds top-p of the kept weight."""
    goal_S1 = top_p_S1 * kept_SV.sum(-1, keepdim=True)
    width = min(_NUCLEUS, kept_SV.shape[-1])
    while True:
        likeliest = kept_SV.topk(width, dim=-1)
        inside = (likeliest.values.cumsum(-1) < goal_S1) & (top_p_S1 < 1)
        if width == kept_SV.shape[-1] or not bool(inside[:, -1].any()):
            break
        width = kept_SV.shape[-1]
    last = inside.sum(-1, keepdim=True).clamp_max(width - 1)
    reach_S1 = below_SV.gather(-1, likeliest.indices.gather(-1, last))
    return reach_S1.masked_fill(top_p_S1 >= 1, torch.inf)
