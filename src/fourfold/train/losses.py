"""What is minimised: cross-entropy without ever holding all logits, and what balances the experts.

Shapes: T tokens, D model width, V vocabulary, E experts, K experts per token, B rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels.training import cross_entropy as chunk_loss
from fourfold.models.decoder import Decoder
from fourfold.quantize.weights import DenseWeight
from fourfold.train.config import RouterSection
from fourfold.train.parallel import Parallel
from fourfold.train.router import TrainedRouting
from fourfold.train.step import TrainStep

# Logits of a chunk: enough for full speed of the products, little beside everything else.
_CHUNK_BYTES = 256 << 20
_ROWS = 1 << 14
"""Of hidden states that are scaled at once."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made with the loss, chunk by chunk: no product is done twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor, wanted: bool
    ) -> Tensor:
        vocabulary = len(weight_VD)
        chunk = max(1, _CHUNK_BYTES // (vocabulary * weight_VD.element_size()))
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        grad_TD = torch.empty_like(hidden_TD) if wanted else None
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        for begin in range(0, len(hidden_TD), chunk):
            part = slice(begin, begin + chunk)
            logits_SV = F.linear(hidden_TD[part], weight_VD)
            loss += chunk_loss(logits_SV, target_T[part], gradient=wanted).sum()
            if grad_TD is None or grad_VD is None:
                continue
            # The logits are their own gradients by now.
            torch.mm(logits_SV, weight_VD, out=grad_TD[part])
            grad_VD += logits_SV.T @ hidden_TD[part]
        if grad_TD is not None and grad_VD is not None:
            ctx.save_for_backward(grad_TD, grad_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_TD, grad_VD = ctx.saved_tensors
        # In float32, a part at a time: a step's scale, rounded, would not be that of the head.
        scaled_TD = torch.empty_like(grad_TD)
        for begin in range(0, len(grad_TD), _ROWS):
            part = slice(begin, begin + _ROWS)
            torch.mul(grad_TD[part].float(), grad, out=scaled_TD[part])
        return scaled_TD, (grad_VD * grad).to(ctx.weight_dtype), None, None


def cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    """The sum of the cross-entropy of all tokens whose target is not negative, in nats, float32."""
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, target_T, torch.is_grad_enabled()
    )
    return loss


def prediction_loss(model: Decoder, step: TrainStep, tokens_T: Tensor, target_T: Tensor) -> Tensor:
    """Runs the model: `cross_entropy` of what it predicts."""
    hidden_TD = model(tokens_T, step.documents.positions_T, step)
    head = model.head.weight
    assert isinstance(head, DenseWeight)
    return cross_entropy(hidden_TD, head.weight, target_T)


def _choices(routing: TrainedRouting, rows: int) -> Tensor:
    """The choices of each row that fell on each expert, float32 [B, E]."""
    # A token chooses an expert once, so no two writes meet.
    chosen_TE = torch.zeros_like(routing.logits_TE).scatter_(1, routing.experts_TK, 1.0)
    return chosen_TE.view(rows, -1, chosen_TE.shape[1]).sum(1)


def balance_loss(routing: TrainedRouting, choices_BE: Tensor) -> Tensor:
    """Mean over rows of `E * sum(share of choices * mean score)` over the experts: 1 where loads
    are even. `choices_BE` fell on each expert; the scores are cut into as many rows."""
    rows, experts = choices_BE.shape
    share_BE = choices_BE / choices_BE.sum(1, keepdim=True)
    score_BE = routing.share_TE.view(rows, -1, experts).mean(1)
    return experts * (share_BE * score_BE).sum() / rows


class Scale(NamedTuple):
    """What a token's cross-entropy and a micro-batch's balance count for in a step's loss."""

    of_token: Tensor | float
    of_micro_batch: float


class Losses(NamedTuple):
    """Of a micro-batch. `total` has gradients; the others are what it is made of, unweighted."""

    total: Tensor
    cross_entropy: Tensor
    """Summed over tokens, nats."""
    balance: Tensor
    """Mean over layers."""
    z: Tensor
    """Squared log-sum-exp of router logits, mean over tokens and layers."""


class Objective:
    """The training loss of a decoder's micro-batches."""

    def __init__(self, router: RouterSection, parallel: Parallel) -> None:
        self._router, self._parallel = router, parallel

    def __call__(
        self, model: Decoder, step: TrainStep, tokens_T: Tensor, target_T: Tensor, scale: Scale
    ) -> Losses:
        """Runs the model. `scale` makes the totals of all micro-batches of a step add up to its
        loss."""
        loss = prediction_loss(model, step, tokens_T, target_T)
        total = loss * scale.of_token
        if not step.routings:
            nothing = torch.zeros((), device=loss.device)
            return Losses(total, loss.detach(), nothing, nothing)
        balance = self._balance(step)
        z = torch.stack([each.logits_TE.logsumexp(-1).square().mean() for each in step.routings])
        weighted = self._router.balance_loss * balance + self._router.z_loss * z.mean()
        total = total + weighted * scale.of_micro_batch
        return Losses(total, loss.detach(), balance.detach(), z.mean().detach())

    def _balance(self, step: TrainStep) -> Tensor:
        """The balance loss, mean over layers."""
        routings = step.routings
        if self._router.balance_over == "sequence":
            choices = [_choices(each, step.documents.rows) for each in routings]
        else:
            # Only the scores have gradients, so the choices of others can be added.
            choices = list(torch.split(self._parallel.summed(step.loads()), 1))
        pairs = zip(routings, choices, strict=True)
        return torch.stack([balance_loss(each, choices_BE) for each, choices_BE in pairs]).mean()
