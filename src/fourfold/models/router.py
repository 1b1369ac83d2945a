"""The router: which experts a token goes to, and with what weight.

One component with options for every family: softmax or sigmoid scores, gates normalised or not, a
selection bias that chooses but does not weigh (balancing without an auxiliary loss), a scale on
the gates. Always in float32, whatever the model computes in.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.models.config import MoEConfig
from fourfold.quadrants.experts import Routing

# Sigmoid scores may all underflow; their sum must not be divided by as zero.
_SMALLEST = 1e-20


class Router(nn.Module):
    """Top-k routing by the scores of one linear map."""

    selection_bias: Tensor | None

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, width), requires_grad=False)
        self.selection_bias = (
            nn.Parameter(torch.empty(config.experts), requires_grad=False)
            if config.selection_bias
            else None
        )

    def forward(self, x_TD: Tensor) -> Routing:
        logits_TE = F.linear(x_TD.float(), self.weight)
        return self.route(logits_TE)

    def route(self, logits_TE: Tensor) -> Routing:
        """The routing for given float32 logits."""
        config = self.config
        if config.score == "softmax" and config.normalise and self.selection_bias is None:
            # The chosen scores over their sum: the softmax of the chosen logits alone.
            chosen = logits_TE.topk(config.experts_per_token, dim=-1)
            return Routing(chosen.values.softmax(-1) * config.scale, chosen.indices)
        scores_TE = logits_TE.softmax(-1) if config.score == "softmax" else logits_TE.sigmoid()
        if self.selection_bias is None:
            gates_TK, experts_TK = scores_TE.topk(config.experts_per_token, dim=-1)
        else:
            chosen = (scores_TE + self.selection_bias).topk(config.experts_per_token, dim=-1)
            experts_TK = chosen.indices
            gates_TK = scores_TE.gather(-1, experts_TK)
        if config.normalise:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + _SMALLEST)
        if config.scale != 1.0:
            gates_TK = gates_TK * config.scale
        return Routing(gates_TK, experts_TK)


class UniformRouter(Router):
    """Routes every token to experts drawn evenly, whatever it holds: for benchmarks only.

    Random weights send all tokens to the same few experts and flatter every figure. Row t takes K
    neighbouring experts from a hash of its row, the layer and the step: even, and repeatable.
    """

    def __init__(self, config: MoEConfig, width: int, layer: int) -> None:
        super().__init__(config, width)
        self.layer = layer
        self.steps = 0

    def forward(self, x_TD: Tensor) -> Routing:
        tokens, experts, chosen = x_TD.shape[0], self.config.experts, self.config.experts_per_token
        self.steps += 1
        row_T = torch.arange(tokens, device=x_TD.device)
        hash_T = (row_T + (self.layer << 20) + self.steps * 0x9E3779B1) & 0xFFFFFFFF
        for multiplier in (0x85EBCA6B, 0xC2B2AE35):
            hash_T = ((hash_T ^ (hash_T >> 15)) * multiplier) & 0xFFFFFFFF
        first_T = (hash_T * experts) >> 32
        within_K = torch.arange(chosen, device=x_TD.device)
        experts_TK = (first_T[:, None] + within_K[None]) % experts
        gates_TK = torch.full(experts_TK.shape, 1 / chosen, device=x_TD.device)
        return Routing(gates_TK, experts_TK)
