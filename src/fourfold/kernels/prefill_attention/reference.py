"""What `paged_int8_attention_prefill` computes, in plain PyTorch: the oracle, and how a CPU serves.

Products of 8-bit codes are taken in float32, where they are exact: INT8 sums stay below 2 ** 24.
Work goes page block by page block with all rows of a chunk at once.

Shapes: T rows, H query heads, G KV heads, J query heads of a KV head, C head width, N = n = 64
tokens per page, B pages of a block, R rows of a chunk, L pages that a chunk's rows lie in.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels.pages.layout import PAGE_TOKENS, VALUE_ORDER, PageCodes, PageLayout
from fourfold.kernels.prefill_attention.batch import PrefillBatch, PrefillChunk

_TINY = 1e-30
_PAGES_AT_ONCE = 8


def prefill_reference(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    records: Tensor,
    layout: PageLayout,
    batch: PrefillBatch,
    *,
    scale: float,
) -> Tensor:
    """Attention of every chunk's rows [T, H, C], in q's dtype; rows of no chunk are zero."""
    out_THC = torch.zeros_like(q_THC)
    for chunk in batch.chunks:
        rows = slice(chunk.first_row, chunk.first_row + chunk.rows)
        out_THC[rows] = _chunk(
            q_THC[rows], k_TGC[rows], v_TGC[rows], records, layout, chunk, scale * math.log2(math.e)
        )
    return out_THC


def quantize_queries(q: Tensor, codes: PageCodes) -> tuple[Tensor, Tensor]:
    """Codes, as float32, of rows [..., C] and their scales [..., 1]."""
    q = q.float()
    largest = q.abs().amax(-1, keepdim=True).clamp_min(_TINY)
    scaled = q * (codes.largest / largest)
    rounded = scaled.round() if codes is PageCodes.INT8 else scaled.to(codes.dtype).float()
    return rounded, largest / codes.largest


def _chunk(
    q_RHC: Tensor,
    k_RGC: Tensor,
    v_RGC: Tensor,
    records: Tensor,
    layout: PageLayout,
    chunk: PrefillChunk,
    scale_log2: float,
) -> Tensor:
    rows, _, width = q_RHC.shape
    q_GRJC = q_RHC.reshape(rows, layout.kv_heads, -1, width).permute(1, 0, 2, 3)
    o_GRJC, sum_GRJ, top_GRJ = _own_page(q_GRJC, k_RGC, v_RGC, scale_log2)
    o_GRJC, sum_GRJ = o_GRJC * layout.codes.largest, sum_GRJ * layout.codes.largest
    q8_GRJC, step_GRJ1 = quantize_queries(q_GRJC, layout.codes)
    own_page_R = torch.arange(chunk.rows, device=records.device) // PAGE_TOKENS
    own_page_R = own_page_R + chunk.prefix_tokens // PAGE_TOKENS
    for start in range(0, chunk.pages_read, _PAGES_AT_ONCE):
        pages = list(chunk.page_ids[start : min(start + _PAGES_AT_ONCE, chunk.pages_read)])
        # Rows whose own page is the block's first, or before, see nothing of it.
        seeing = slice(max(0, (start + 1) * PAGE_TOKENS - chunk.prefix_tokens), None)
        before_RB = (
            start + torch.arange(len(pages), device=records.device) < own_page_R[seeing, None]
        )
        page_GRJBC, sum_GRJB, top_GRJB = _pages(
            q8_GRJC[:, seeing], step_GRJ1[:, seeing] * scale_log2, records[pages], layout
        )
        top_GRJB = top_GRJB.masked_fill(~before_RB[:, None], -torch.inf)
        old_GRJ = top_GRJ[:, seeing]
        new_GRJ = torch.maximum(old_GRJ, top_GRJB.amax(-1))
        weight_GRJB = torch.exp2(top_GRJB - new_GRJ[..., None])
        keep_GRJ = torch.exp2(old_GRJ - new_GRJ)
        o_GRJC[:, seeing] *= keep_GRJ[..., None]
        o_GRJC[:, seeing] += (page_GRJBC * weight_GRJB[..., None]).sum(-2)
        sum_GRJ[:, seeing] *= keep_GRJ
        sum_GRJ[:, seeing] += (sum_GRJB * weight_GRJB).sum(-1)
        top_GRJ[:, seeing] = new_GRJ
    out_GRJC = o_GRJC / sum_GRJ[..., None]
    return out_GRJC.permute(1, 0, 2, 3).flatten(1, 2).to(q_RHC.dtype)


def _own_page(
    q_GRJC: Tensor, k_RGC: Tensor, v_RGC: Tensor, scale_log2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Every row over its own page up to itself: values [G, R, J, C], sums and maxima [G, R, J]."""
    kv_heads, rows, group, width = q_GRJC.shape
    missing = -rows % PAGE_TOKENS
    q_GLNJC = F.pad(q_GRJC.float(), (0, 0, 0, 0, 0, missing)).reshape(
        kv_heads, -1, PAGE_TOKENS, group, width
    )
    k_GLNC, v_GLNC = (
        F.pad(x.float().transpose(0, 1), (0, 0, 0, missing)).reshape(
            kv_heads, -1, PAGE_TOKENS, width
        )
        for x in (k_RGC, v_RGC)
    )
    x_GLNJn = torch.einsum("glnjc,glmc->glnjm", q_GLNJC, k_GLNC) * scale_log2
    place_N = torch.arange(PAGE_TOKENS, device=q_GRJC.device)
    x_GLNJn = x_GLNJn.masked_fill(place_N > place_N[:, None, None], -torch.inf)
    top_GLNJ = x_GLNJn.amax(-1)
    p_GLNJn = torch.exp2(x_GLNJn - top_GLNJ[..., None]).to(q_GRJC.dtype).float()
    o_GLNJC = torch.einsum("glnjm,glmc->glnjc", p_GLNJn, v_GLNC)
    return (
        o_GLNJC.flatten(1, 2)[:, :rows],
        p_GLNJn.sum(-1).flatten(1, 2)[:, :rows],
        top_GLNJ.flatten(1, 2)[:, :rows],
    )


def _pages(
    q8_GRJC: Tensor, step_GRJ1: Tensor, records: Tensor, layout: PageLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows over whole pages one by one: values [G, R, J, B, C], sums and maxima [G, R, J, B]."""
    views = layout.views(records)
    keys_GBNC = views.keys.float().transpose(0, 1)
    values_GBNC = torch.empty_like(keys_GBNC)
    values_GBNC[:, :, list(VALUE_ORDER)] = views.values.float().permute(1, 0, 3, 2)
    k_scale_GB, v_scale_GB = views.scales.permute(1, 2, 0)
    s_GRJBN = torch.einsum("grjc,gbnc->grjbn", q8_GRJC, keys_GBNC)
    x_GRJBN = s_GRJBN * (step_GRJ1 * k_scale_GB[:, None, None])[..., None]
    top_GRJB = x_GRJBN.amax(-1)
    p_GRJBN = torch.exp2(x_GRJBN - top_GRJB[..., None]) * layout.codes.largest
    if layout.codes is PageCodes.INT8:
        p_GRJBN = p_GRJBN.round()
        sum_GRJB = p_GRJBN.sum(-1)
    else:
        sum_GRJB = p_GRJBN.sum(-1)
        p_GRJBN = p_GRJBN.to(layout.codes.dtype).float()
    page_GRJBC = torch.einsum("grjbn,gbnc->grjbc", p_GRJBN, values_GBNC)
    return page_GRJBC * v_scale_GB[:, None, None, :, None], sum_GRJB, top_GRJB
