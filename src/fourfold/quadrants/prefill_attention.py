"""Prefill attention: a chunk of one sequence against its prefix and itself, compute-bound.

Plain PyTorch form: torch's fused scaled-dot-product attention, query heads that share a KV head
laid out as a batch so that keys are expanded without a copy.

Shapes: T chunk rows, S tokens of prefix plus chunk, H query heads, G KV heads, R = H / G, C width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.quadrants.kv_pages import PAGE_TOKENS, KVPages


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """Rows `start : start + rows` of a step: the tokens after the first `prefix` of a sequence.

    `head_rows` names the runs [G, pages] of the page memory that hold prefix and chunk; `mask`
    [rows, prefix + rows] is true where a row may look, None when there is no prefix (plain causal).
    """

    start: int
    rows: int
    prefix: int
    head_rows: Tensor | None
    mask: Tensor | None


def describe_chunk(
    start: int,
    rows: int,
    prefix: int,
    pages: Sequence[int],
    *,
    kv_heads: int,
    device: torch.device,
) -> PrefillChunk:
    """The description of a chunk held in `pages`. Without a prefix nothing is read from pages."""
    if prefix == 0:
        return PrefillChunk(start=start, rows=rows, prefix=0, head_rows=None, mask=None)
    total = prefix + rows
    table_M = torch.tensor(pages[: -(-total // PAGE_TOKENS)], dtype=torch.int64)
    head_rows = table_M[None] * kv_heads + torch.arange(kv_heads)[:, None]
    mask = torch.ones(rows, total, dtype=torch.bool, device=device).tril_(prefix)
    return PrefillChunk(
        start=start,
        rows=rows,
        prefix=prefix,
        head_rows=head_rows.flatten().to(device, non_blocking=True),
        mask=mask,
    )


def prefill_attention(
    q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, pages: KVPages, layer: int, chunk: PrefillChunk
) -> Tensor:
    """Causal attention of one chunk; inputs are the chunk's rows alone. Returns [T, H, C]."""
    rows, heads, width = q_THC.shape
    kv_heads = pages.kv_heads
    dtype = pages.keys.dtype
    if chunk.head_rows is None:
        k_GSC, v_GSC = k_TGC.to(dtype).transpose(0, 1), v_TGC.to(dtype).transpose(0, 1)
    else:
        k, v = pages.gather(layer, chunk.head_rows)
        total = chunk.prefix + rows
        k_GSC = k.view(kv_heads, -1, width)[:, :total]
        v_GSC = v.view(kv_heads, -1, width)[:, :total]
    shared = heads // kv_heads
    out_GRTC = F.scaled_dot_product_attention(
        q_THC.to(dtype).view(rows, kv_heads, shared, width).permute(1, 2, 0, 3),
        k_GSC[:, None].expand(-1, shared, -1, -1),
        v_GSC[:, None].expand(-1, shared, -1, -1),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
    )
    return out_GRTC.permute(2, 0, 1, 3).reshape(rows, heads, width).to(q_THC.dtype)
