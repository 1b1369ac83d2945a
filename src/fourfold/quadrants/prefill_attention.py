"""Prefill attention: chunks of prompts against their prefixes and themselves, compute-bound.

Two forms, by the kind of page memory. Over float pages: torch's fused attention, one chunk after
the other, keys expanded to the query heads that share them without a copy. Over coded pages: all
chunks of the step in one call of `paged_int8_attention_prefill`, which reads finished pages in 8
bits and each row's own page from the step's rows.

Shapes: T chunk rows, S tokens of prefix plus chunk, H query heads, G KV heads, R = H / G, C width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels.prefill_attention import (
    PrefillBatch,
    PrefillChunk,
    paged_int8_attention_prefill,
)
from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages, FloatPages, Span


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Rows `start : start + rows`: the tokens after the first `prefix` of a sequence.

    `runs` names keys and values of prefix and chunk in the page memory; `mask` is true where a row
    may look, [rows, prefix + rows]. Both are None where there is no prefix (plain causal).
    """

    start: int
    rows: int
    prefix: int
    runs: Tensor | None
    mask: Tensor | None


class FloatPrefillAttention:
    """The chunks of one step over float pages; described once, used by every layer."""

    def __init__(self, spans: Sequence[Span], pages: FloatPages) -> None:
        self._pages = pages
        self._chunks: list[_Chunk] = []
        start = 0
        for span in spans:
            self._chunks.append(self._describe(start, span))
            start += span.length

    def _describe(self, start: int, span: Span) -> _Chunk:
        rows, prefix = span.length, span.start
        if prefix == 0:
            return _Chunk(start=start, rows=rows, prefix=0, runs=None, mask=None)
        used = torch.tensor(np.asarray(span.pages[: -(-span.end // PAGE_TOKENS)])[None])
        mask = torch.ones(rows, span.end, dtype=torch.bool, device=self._pages.device)
        runs = self._pages.runs(used)
        return _Chunk(start=start, rows=rows, prefix=prefix, runs=runs, mask=mask.tril_(prefix))

    def __call__(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Causal attention of the chunks' rows; [T, H, C] in the dtype of `q_THC`."""
        outputs = []
        for chunk in self._chunks:
            rows = slice(chunk.start, chunk.start + chunk.rows)
            outputs.append(self._attend(layer, q_THC[rows], k_TGC[rows], v_TGC[rows], chunk))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(
        self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, chunk: _Chunk
    ) -> Tensor:
        rows, heads, width = q_THC.shape
        kv_heads, dtype = self._pages.shape.kv_heads, self._pages.shape.dtype
        if chunk.runs is None:
            k_GSC, v_GSC = k_TGC.to(dtype).transpose(0, 1), v_TGC.to(dtype).transpose(0, 1)
        else:
            kv = self._pages.gather(layer, chunk.runs).view(2, kv_heads, -1, width)
            k_GSC, v_GSC = kv[:, :, : chunk.prefix + rows]
        shared = heads // kv_heads
        # Query heads of a KV head lie along the batch: where it is heads that share keys, torch's
        # kernels take a last row that is alone in its block for a lone query, and its heads for
        # rows.
        out_RGTC = F.scaled_dot_product_attention(
            q_THC.to(dtype).view(rows, kv_heads, shared, width).permute(2, 1, 0, 3),
            k_GSC.expand(shared, -1, -1, -1),
            v_GSC.expand(shared, -1, -1, -1),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
        )
        return out_RGTC.permute(2, 1, 0, 3).reshape(rows, heads, width).to(q_THC.dtype)


def prefill_chunks(spans: Sequence[Span]) -> list[PrefillChunk]:
    """The chunks of a step, whose rows follow each other."""
    chunks, row = [], 0
    for span in spans:
        chunks.append(PrefillChunk(row, span.length, span.start, span.pages))
        row += span.length
    return chunks


class CodedPrefillAttention:
    """Chunks over coded pages; they begin with a page."""

    def __init__(self, pages: CodedPages, batch: PrefillBatch) -> None:
        self._pages = pages
        self._batch = batch

    def __call__(
        self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor, out_THC: Tensor
    ) -> None:
        """Causal attention of the chunks' rows, [T, H, C] in the dtype of `q_THC`."""
        pages = self._pages
        paged_int8_attention_prefill(
            q_THC, k_TGC, v_TGC, pages.records[layer], pages.layout, self._batch, out_THC=out_THC
        )
