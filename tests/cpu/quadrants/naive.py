"""A routed FFN one token and one expert at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.quadrants.experts import Routing


def routing(tokens: int, experts: int, chosen: int, seed: int = 0) -> Routing:
    """Each token's own random experts, gates that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator).softmax(-1).topk(chosen, -1)
    return Routing(scores.values / scores.values.sum(-1, keepdim=True), scores.indices)


def weights(experts: int, width: int, ffn_width: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random `gate_up` [E, 2F, D] and `down` [E, D, F]."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(experts, 2 * ffn_width, width, generator=generator) / width**0.5
    down = torch.randn(experts, width, ffn_width, generator=generator) / ffn_width**0.5
    return gate_up, down


def tokens(count: int, width: int, seed: int = 2) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def routed_ffn(x_TD: Tensor, routed: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    half = gate_up.shape[1] // 2
    out = torch.zeros(x_TD.shape, dtype=torch.float64)
    for token, x in enumerate(x_TD.double()):
        for gate, expert in zip(routed.gates_TK[token], routed.experts_TK[token], strict=True):
            inner = gate_up[expert].double() @ x
            hidden = inner[:half] / (1 + (-inner[:half]).exp()) * inner[half:]
            out[token] += gate.double() * (down[expert].double() @ hidden)
    return out
