"""One engine step laid out over the four quadrants.

The rows of a step are the decode rows first (one token of each decoding sequence), then the chunks
of prompts being prefilled. Attention splits there; the FFN takes all rows together, because the
experts' weights are then read once, and counts as prefill as soon as the step prefills anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.quadrants.decode_attention import plan_decode_attention
from fourfold.quadrants.decode_ffn import decode_ffn
from fourfold.quadrants.experts import ExpertWeights, Routing
from fourfold.quadrants.kv_pages import KVPages, Span
from fourfold.quadrants.prefill_attention import plan_prefill_attention
from fourfold.quadrants.prefill_ffn import prefill_ffn
from fourfold.quantize.weights import Activations


class QuadrantStep:
    """The work of one step, described once and used by every layer.

    `decodes` are spans of length 1; `prefills` follow them in row order; `heads` are the model's
    query heads. Tensors are made on the pages' device. `positions_T` int64 is each row's place in
    its sequence.
    """

    def __init__(
        self, pages: KVPages, decodes: Sequence[Span], prefills: Sequence[Span], *, heads: int
    ) -> None:
        spans = [*decodes, *prefills]
        positions_T = torch.tensor([p for span in spans for p in range(span.start, span.end)])
        self.positions_T = positions_T.to(pages.device, non_blocking=True)
        self._decode_rows = len(decodes)
        self._decode = plan_decode_attention(decodes, pages, heads) if decodes else None
        self._prefill = plan_prefill_attention(prefills, pages, heads) if prefills else None
        self._writes = pages.writes(spans)

    def attention(self, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
        """Stores the rows' keys and values, then attends; [T, H, C] in the dtype of `q_THC`."""
        self._writes.before_attention(layer, k_TGC, v_TGC)
        first = self._decode_rows
        parts = []
        if self._decode is not None:
            parts.append(self._decode(layer, q_THC[:first]))
        if self._prefill is not None:
            parts.append(self._prefill(layer, q_THC[first:], k_TGC[first:], v_TGC[first:]))
        self._writes.after_attention(layer)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def experts(self, x: Activations, routing: Routing, weights: ExpertWeights) -> Tensor:
        """The routed FFN of all rows; [T, D]."""
        ffn = decode_ffn if self._prefill is None else prefill_ffn
        return ffn(x, routing, weights)
