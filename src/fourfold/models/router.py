"""The router: which experts a token goes to, and with what weight.

One component with options for every family: softmax or sigmoid scores, gates normalised or not, a
selection bias that chooses but does not weigh (balancing without an auxiliary loss), a scale on
the gates. Always in float32, whatever the model computes in.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourfold.kernels.routing import Rule, Spread, route, route_and_group
from fourfold.models.config import MoEConfig
from fourfold.quadrants.experts import GroupedRouting, Routing


class Router(nn.Module):
    """Top-k routing by the scores of one linear map."""

    selection_bias: Tensor | None

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.rule = Rule(config.experts_per_token, config.score, config.normalise, config.scale)
        self.weight = nn.Parameter(torch.empty(config.experts, width), requires_grad=False)
        self.selection_bias = (
            nn.Parameter(torch.empty(config.experts), requires_grad=False)
            if config.selection_bias
            else None
        )

    def forward(self, x_TD: Tensor) -> Routing:
        bias_E, spread = self.selection_bias, self._spread()
        return Routing(*route(x_TD, self.weight, self.rule, bias_E=bias_E, spread=spread))

    def grouped(self, x_TD: Tensor, live_T: Tensor | None) -> GroupedRouting:
        """The same choice, and its rows sorted by expert; those where `live_T` is 0 by none."""
        bias_E, spread = self.selection_bias, self._spread()
        return GroupedRouting(
            *route_and_group(
                x_TD, self.weight, self.rule, bias_E=bias_E, spread=spread, live_T=live_T
            )
        )

    def _spread(self) -> Spread | None:
        return None


class UniformRouter(Router):
    """Routes every token to experts drawn evenly, whatever it holds: for benchmarks only.

    Random weights send all tokens to the same few experts and flatter every figure. Here a row may
    only choose among K neighbouring experts that depend on its place, the layer and the step; it is
    as much work as routing is. Steps are counted on the device, so that a captured graph goes on
    counting.
    """

    steps: Tensor

    def __init__(self, replaced: Router, layer: int) -> None:
        """Takes over the weights of the router that it replaces."""
        super().__init__(replaced.config, replaced.weight.shape[1])
        self.weight, self.selection_bias = replaced.weight, replaced.selection_bias
        self.seed = layer << 20
        steps = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        self.register_buffer("steps", steps, persistent=False)

    def _spread(self) -> Spread:
        return Spread(self.seed, self.steps)
