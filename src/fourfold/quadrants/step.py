"""One engine step laid out over the four quadrants.

The rows of a step are the decode rows first (one token of each decoding sequence), then the chunks
of prompts being prefilled. Attention splits there; the FFN takes all rows together, because the
experts' weights are then read once, and counts as prefill as soon as the step prefills anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.quadrants.decode_attention import DecodeGroup, decode_attention, describe_decode
from fourfold.quadrants.decode_ffn import decode_ffn
from fourfold.quadrants.experts import ExpertWeights, Routing
from fourfold.quadrants.kv_pages import PAGE_TOKENS, KVPages
from fourfold.quadrants.prefill_attention import PrefillChunk, describe_chunk, prefill_attention
from fourfold.quadrants.prefill_ffn import prefill_ffn


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens `start : start + length` of one sequence, whose KV lives in `pages` in order."""

    start: int
    length: int
    pages: Sequence[int]


class QuadrantStep:
    """The work of one step, described once and used by every layer.

    `decodes` are spans of length 1; `prefills` follow them in row order. Tensors are made on the
    pages' device. `positions_T` int64 is each row's place in its sequence.
    """

    def __init__(self, pages: KVPages, decodes: Sequence[Span], prefills: Sequence[Span]) -> None:
        device = pages.device
        self._pages = pages
        self._decode_rows = len(decodes)
        spans = [*decodes, *prefills]
        positions = [p for span in spans for p in range(span.start, span.start + span.length)]
        page = [
            span.pages[position // PAGE_TOKENS]
            for span in spans
            for position in range(span.start, span.start + span.length)
        ]
        positions_T = torch.tensor(positions)
        self.positions_T = positions_T.to(device, non_blocking=True)
        self._places = pages.places(torch.tensor(page), positions_T % PAGE_TOKENS)
        self._groups: tuple[DecodeGroup, ...] = ()
        if decodes:
            self._groups = describe_decode(
                [span.start + 1 for span in decodes], [span.pages for span in decodes], pages
            )
        self._chunks: list[PrefillChunk] = []
        row = len(decodes)
        for span in prefills:
            chunk = describe_chunk(row, span.length, span.start, span.pages, pages)
            self._chunks.append(chunk)
            row += span.length

    def attention(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Stores the rows' keys and values, then attends; [T, H, C] in the dtype of `q_THC`."""
        self._pages.write(layer, self._places, k_TGC, v_TGC)
        parts = []
        if self._decode_rows:
            decode_q = q_THC[: self._decode_rows]
            parts.append(decode_attention(decode_q, self._pages, layer, self._groups))
        for chunk in self._chunks:
            rows = slice(chunk.start, chunk.start + chunk.rows)
            parts.append(
                prefill_attention(q_THC[rows], k_TGC[rows], v_TGC[rows], self._pages, layer, chunk)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def experts(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        """The routed FFN of all rows; [T, D]."""
        ffn = prefill_ffn if self._chunks else decode_ffn
        return ffn(x_TD, routing, weights)
