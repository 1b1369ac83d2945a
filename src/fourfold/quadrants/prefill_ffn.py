"""Prefill FFN: many tokens of many requests through their experts at once, compute-bound.

Rows are sorted by expert and every expert sees one dense product over all of its rows. In floating
point, and in 4-bit codes on a GPU, that is one grouped product and nothing is read on the host, so
a GPU is never waited for; a CPU visits 8-bit experts one by one.

Shapes: as in `experts`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.grouped_gemm import grouped_gemm
from fourfold.kernels.routing import group_rows
from fourfold.kernels.w4a8_gemm import grouped_w4a8_gemm
from fourfold.quadrants.experts import (
    Delta,
    ExpertWeights,
    GroupedRouting,
    Routed,
    Routing,
    combine,
    swiglu,
    visit_experts,
)
from fourfold.quantize.weights import Activations, CudaW4A8Weight, DenseWeight


def prefill_ffn(
    x: Activations, routing: Routing, weights: ExpertWeights, live_T: Tensor | None = None
) -> Delta:
    """Routed FFN of every token; [T, D] in the dtype of `x`, in 4-bit codes on a GPU not combined.

    `live_T` int32 is 0 for tokens that only pad a step. In 4-bit codes on a GPU these touch no
    weight and come back as zeros; the other forms compute them like any token.
    """
    if isinstance(weights.gate_up, CudaW4A8Weight):
        return _w4a8_ffn(x, routing, weights, weights.gate_up, live_T)
    x_TD = x.kept
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


def _w4a8_ffn(
    x: Activations,
    routing: Routing,
    weights: ExpertWeights,
    gate_up: CudaW4A8Weight,
    live_T: Tensor | None,
) -> Routed:
    """Two grouped products; the first gathers its rows and ends in SwiGLU, the second puts each row
    back in its token's place."""
    down = weights.down
    assert isinstance(down, CudaW4A8Weight)
    chosen = routing.experts_TK.shape[1]
    if isinstance(routing, GroupedRouting):
        groups = routing.groups
    else:
        groups = group_rows(weights.slot_of(routing.experts_TK), weights.slots, live_T=live_T)
    codes_TD, scale_T = x.encoded_for(gate_up)
    hidden_RF = grouped_w4a8_gemm(
        codes_TD,
        scale_T,
        gate_up.packed,
        groups,
        gather=chosen,
        scatter=False,
        swiglu=True,
        out_dtype=torch.bfloat16,
    )
    codes_RF, scale_R = down.encode(hidden_RF)
    out_RD = grouped_w4a8_gemm(
        codes_RF,
        scale_R,
        down.packed,
        groups,
        gather=None,
        scatter=True,
        swiglu=False,
        out_dtype=x.dtype,
    )
    return Routed(out_RD.view(*routing.experts_TK.shape, -1), routing.gates_TK, live_T)
