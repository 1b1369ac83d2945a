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

    `runs` names keys and values of prefix and chunk in the page memory; `mask` is true where a row
    may look, [rows, prefix + rows]. Both are None where there is no prefix (plain causal).
    """

    start: int
    rows: int
    prefix: int
    runs: Tensor | None
    mask: Tensor | None


def describe_chunk(
    start: int, rows: int, prefix: int, table: Sequence[int], pages: KVPages
) -> PrefillChunk:
    """The description of a chunk whose sequence's pages `table` lists."""
    if prefix == 0:
        return PrefillChunk(start=start, rows=rows, prefix=0, runs=None, mask=None)
    total = prefix + rows
    used = torch.tensor([table[: -(-total // PAGE_TOKENS)]])
    mask = torch.ones(rows, total, dtype=torch.bool, device=pages.device).tril_(prefix)
    return PrefillChunk(start=start, rows=rows, prefix=prefix, runs=pages.runs(used), mask=mask)


def prefill_attention(
    q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, pages: KVPages, layer: int, chunk: PrefillChunk
) -> Tensor:
    """Causal attention of one chunk; inputs are the chunk's rows alone. Returns [T, H, C]."""
    rows, heads, width = q_THC.shape
    kv_heads, dtype = pages.shape.kv_heads, pages.shape.dtype
    if chunk.runs is None:
        k_GSC, v_GSC = k_TGC.to(dtype).transpose(0, 1), v_TGC.to(dtype).transpose(0, 1)
    else:
        kv = pages.gather(layer, chunk.runs).view(2, kv_heads, -1, width)
        k_GSC, v_GSC = kv[:, :, : chunk.prefix + rows]
    shared = heads // kv_heads
    out_GRTC = F.scaled_dot_product_attention(
        q_THC.to(dtype).view(rows, kv_heads, shared, width).permute(1, 2, 0, 3),
        k_GSC[:, None].expand(-1, shared, -1, -1),
        v_GSC[:, None].expand(-1, shared, -1, -1),
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
    )
    return out_GRTC.permute(2, 0, 1, 3).reshape(rows, heads, width).to(q_THC.dtype)
