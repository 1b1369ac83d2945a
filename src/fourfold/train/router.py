"""The router as it is trained: its choice differentiable, its loads seen, its bias moved.

A selection bias is not learnt by gradients: after each step it goes up for experts that got less
than their share of the global batch, and down for the others. It only chooses, so it bends no
gradient (auxiliary-loss-free balancing, arXiv 2408.15664).

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from fourfold.kernels.routing import choose_experts
from fourfold.models.router import Router
from fourfold.quadrants.experts import Routing

# As when serving: sigmoid scores may all underflow.
_SMALLEST = 1e-20


@dataclasses.dataclass(frozen=True)
class TrainedRouting(Routing):
    """A routing with what balances it: float32 router logits [T, E] and the experts' scores,
    summing to one for a token."""

    logits_TE: Tensor
    share_TE: Tensor


# Releases of FSDP before torch 2.13 look for the tensors of a module's output in what pytree knows,
# and gather a router's weights for its gradients only if they find some.
_pytree.register_dataclass(TrainedRouting)


# Left out of what is compiled: it is one kernel already, of Triton on a GPU.
_choose = torch.compiler.disable(choose_experts)  # type: ignore[no-untyped-call]


class TrainedRouter(Router):
    """Routes as `Router` does, with gradients for the gates."""

    def forward(self, x_TD: Tensor) -> TrainedRouting:
        logits_TE = F.linear(x_TD.float(), self.weight)
        softmax = self.rule.score == "softmax"
        scores_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
        bias_E = self.selection_bias
        experts_TK = _choose(logits_TE.detach(), self.rule, bias_E=bias_E)
        if softmax:
            gates_TK = logits_TE.gather(-1, experts_TK).softmax(-1)
            share_TE = scores_TE
        else:
            gates_TK = scores_TE.gather(-1, experts_TK)
            gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True).clamp_min(_SMALLEST)
            share_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(_SMALLEST)
        return TrainedRouting(gates_TK * self.rule.scale, experts_TK, logits_TE, share_TE)

    @torch.no_grad()
    def move_bias(self, load_E: Tensor, rate: Tensor | float) -> None:
        """Moves the bias by `rate` towards even loads; `load_E`, rows that went to each expert, is
        the global batch's."""
        if self.selection_bias is not None:
            self.selection_bias += rate * torch.sign(load_E.mean() - load_E)
