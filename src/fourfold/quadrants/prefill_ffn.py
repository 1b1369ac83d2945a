"""Prefill FFN: many tokens of many requests through their experts at once, compute-bound.

Rows are sorted by expert and every expert sees one dense product over all of its rows. In floating
point that is one grouped product and nothing is read on the host, so a GPU is never waited for;
torch has no grouped int8 product, so 8-bit experts are visited one by one.

Shapes: as in `experts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.grouped_gemm import grouped_gemm
from fourfold.quadrants.experts import ExpertWeights, Routing, combine, swiglu, visit_experts
from fourfold.quantize.weights import DenseWeight


def prefill_ffn(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Routed FFN of every token; [T, D] in the dtype of `x_TD`."""
    tokens, chosen = routing.experts_TK.shape
    slot_R, order_R = weights.slot_of(routing.experts_TK).flatten().sort(stable=True)
    slot_S = torch.arange(weights.slots, device=x_TD.device)
    ends_S = torch.searchsorted(slot_R, slot_S, right=True)
    token_R = order_R // chosen
    if isinstance(weights.gate_up, DenseWeight) and isinstance(weights.down, DenseWeight):
        ends_S = ends_S.int()
        hidden_RF = swiglu(grouped_gemm(x_TD[token_R], weights.gate_up.weight, ends_S))
        sorted_RD = grouped_gemm(hidden_RF, weights.down.weight, ends_S)
    else:
        rows = tuple(tensor[token_R] for tensor in weights.gate_up.encode(x_TD))
        sorted_RD = visit_experts(rows, weights, ends_S.tolist())
    out_RD = torch.empty_like(sorted_RD).index_copy_(0, order_R, sorted_RD)
    return combine(out_RD.view(tokens, chosen, -1), routing.gates_TK).to(x_TD.dtype)
