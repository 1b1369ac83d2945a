"""Decode attention over 8-bit pages in plain PyTorch, from the page tables: no plan.

What a CPU computes, and what the kernels are held against. The same rounding as the kernels:
queries in 8 bits per head, weights in 8 bits relative to the largest score of their own page, exact
int32 sums (in float32, which holds them), the open page in 16 bits.

Shapes: B sequences, Q new rows of each, R = B * Q rows, H query heads, G KV heads, D = H / G, M = Q
* D rows of one KV head, C head width, N = 64 tokens per page, L sealed pages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fourfold.kernels.decode_attention.plan import DecodeSequences
from fourfold.kernels.pages.layout import PAGE_TOKENS, VALUE_ORDER, PageLayout

_TINY = 1e-30


def paged_int8_attention_decode_reference(
    q_RHC: Tensor,
    records: Tensor,
    open_k: Tensor,
    open_v: Tensor,
    layout: PageLayout,
    sequences: DecodeSequences,
    *,
    scale: float | None = None,
) -> Tensor:
    """Arguments and result as `paged_int8_attention_decode`, with the sequences for the plan."""
    count = len(sequences.lengths_B)
    rows, heads, width = q_RHC.shape
    assert rows % count == 0
    assert heads % layout.kv_heads == 0
    new = rows // count
    scale = (width**-0.5 if scale is None else scale) * math.log2(math.e)
    out_RHC = torch.empty_like(q_RHC)
    sealed_B = sequences.sealed_B
    for b in range(count):
        q_QHC = q_RHC[b * new : (b + 1) * new]
        q_GMC = q_QHC.reshape(new, layout.kv_heads, -1, width).transpose(0, 1).flatten(1, 2)
        start = int(sequences.open_slots_B[b]) * PAGE_TOKENS
        shown = int(sequences.lengths_B[b] - sealed_B[b] * PAGE_TOKENS)
        k_NGC, v_NGC = open_k[start : start + shown], open_v[start : start + shown]
        parts = [_attend_open(q_GMC, k_NGC, v_NGC, new, scale)]
        if sealed_B[b]:
            pages = torch.as_tensor(sequences.pages[b][: sealed_B[b]]).long()
            parts.append(_attend_sealed(q_GMC, records[pages.to(records.device)], layout, scale))
        o_GMC = _merge(*(torch.cat(part) for part in zip(*parts, strict=True)))
        out = o_GMC.view(layout.kv_heads, new, -1, width).transpose(0, 1).flatten(1, 2)
        out_RHC[b * new : (b + 1) * new] = out.to(q_RHC.dtype)
    return out_RHC


def _attend_sealed(
    q_GMC: Tensor, records_LR: Tensor, layout: PageLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For each page: weighted values [L, G, M, C], sums of weights and largest scores [L, G, M]."""
    views = layout.views(records_LR)
    q_GMC = q_GMC.float()
    codes, most = layout.codes.dtype, layout.codes.largest
    amax_GM = q_GMC.abs().amax(-1).clamp_min(_TINY)
    q8_GMC = _rounded(q_GMC * (most / amax_GM)[..., None], codes)
    step_GM = amax_GM * (scale / most)
    s_LGMN = q8_GMC @ views.keys.float().transpose(2, 3)
    factor_LGM = step_GM * views.scales[:, 0, :, None]
    largest_LGM = s_LGMN.amax(-1)
    weight_LGMN = torch.exp2((s_LGMN - largest_LGM[..., None]) * factor_LGM[..., None])
    p_LGMN = _rounded(weight_LGMN * most, codes)
    # Of what was rounded to integers the sum is taken after rounding.
    sum_LGM = p_LGMN.sum(-1) / most if codes == torch.int8 else weight_LGMN.sum(-1)
    order = torch.tensor(VALUE_ORDER, device=records_LR.device)
    o_LGMC = p_LGMN[..., order] @ views.values.float().transpose(2, 3)
    o_LGMC *= views.scales[:, 1, :, None, None] / most
    return o_LGMC, sum_LGM, largest_LGM * factor_LGM


def _rounded(x: Tensor, codes: torch.dtype) -> Tensor:
    """The nearest codes, as float32."""
    return x.round() if codes == torch.int8 else x.to(codes).float()


def _attend_open(
    q_GMC: Tensor, k_NGC: Tensor, v_NGC: Tensor, new: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the open page [1, G, M, ...]; the last of `new` rows sees all of it."""
    dtype, shown = q_GMC.dtype, len(k_NGC)
    x_GMN = (q_GMC.float() @ k_NGC.permute(1, 2, 0).float()) * scale
    row_M = torch.arange(q_GMC.shape[1], device=q_GMC.device) // (q_GMC.shape[1] // new)
    sees_M = shown - new + 1 + row_M
    hidden_MN = torch.arange(shown, device=q_GMC.device) >= sees_M[:, None]
    x_GMN = x_GMN.masked_fill(hidden_MN, -torch.inf)
    largest_GM = x_GMN.amax(-1)
    p_GMN = torch.exp2(x_GMN - largest_GM[..., None]).to(dtype).float()
    o_GMC = p_GMN @ v_NGC.transpose(0, 1).float()
    return o_GMC[None], p_GMN.sum(-1)[None], largest_GM[None]


def _merge(o_LGMC: Tensor, sum_LGM: Tensor, largest_LGM: Tensor) -> Tensor:
    """The weighted mean of partial results, [G, M, C]."""
    weight_LGM = torch.exp2(largest_LGM - largest_LGM.amax(0))
    return (o_LGMC * weight_LGM[..., None]).sum(0) / (sum_LGM * weight_LGM).sum(0)[..., None]
