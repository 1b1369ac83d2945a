"""Decode FFN: a few tokens, each touched weight read once, bound by the bytes of those weights.

On a CPU the host sees the routing for nothing, so only the experts that some token chose are
visited and rows are ordered without a device sort. On a GPU the host must not wait to learn the
routing; the grouped product of the prefill quadrant skips empty experts by itself.

Shapes: as in `experts`.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from fourfold.quadrants.experts import Delta, ExpertWeights, Routing, combine, visit_experts
from fourfold.quadrants.prefill_ffn import prefill_ffn
from fourfold.quantize.weights import Activations


def decode_ffn(
    x: Activations, routing: Routing, weights: ExpertWeights, live_T: Tensor | None = None
) -> Delta:
    """Routed FFN of every token, as `prefill_ffn` returns it. A CPU's steps are not padded: there
    `live_T` is not read."""
    if routing.gates_TK.device.type != "cpu":
        return prefill_ffn(x, routing, weights, live_T)
    x_TD = x.kept
    tokens, chosen = routing.experts_TK.shape
    encoded = weights.gate_up.encode(x_TD)
    if weights.slots == 1:
        rows = tuple(tensor.repeat_interleave(chosen, 0) for tensor in encoded)
        out_RD = visit_experts(rows, weights, [tokens * chosen])
        return combine(out_RD.view(tokens, chosen, -1), routing.gates_TK).to(x_TD.dtype)
    slots = weights.slot_of(routing.experts_TK).flatten().tolist()
    order = sorted(range(len(slots)), key=slots.__getitem__)
    in_order = [slots[row] for row in order]
    ends = [bisect_right(in_order, slot) for slot in range(weights.slots)]
    order_R = torch.tensor(order)
    rows = tuple(tensor[order_R // chosen] for tensor in encoded)
    sorted_RD = visit_experts(rows, weights, ends)
    out_RD = torch.empty_like(sorted_RD).index_copy_(0, order_R, sorted_RD)
    return combine(out_RD.view(tokens, chosen, -1), routing.gates_TK).to(x_TD.dtype)
