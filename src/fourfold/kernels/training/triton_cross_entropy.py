"""Cross-entropy in Triton: a program reads its row twice, the second time from the cache, and
leaves the gradient where the logits were.

Shapes: S rows, V vocabulary.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, V, stride, GRADIENT: tl.constexpr, TOKENS: tl.constexpr
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    live = target >= 0
    most_T = tl.full([TOKENS], -float("inf"), tl.float32)
    sum_T = tl.zeros([TOKENS], tl.float32)
    for first in range(0, V, TOKENS):
        token = first + tl.arange(0, TOKENS)
        x = tl.load(logits + token, token < V, other=-float("inf")).to(tl.float32)
        new_T = tl.maximum(most_T, x)
        # A lane that has seen no token yet has nothing to scale.
        known_T = tl.where(new_T == -float("inf"), 0.0, new_T)
        sum_T = sum_T * tl.exp(most_T - known_T) + tl.exp(x - known_T)
        most_T = new_T
    most = tl.max(most_T, 0)
    norm = most + tl.log(tl.sum(sum_T * tl.exp(most_T - most), 0))
    chosen = tl.load(logits + tl.where(live, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(live, norm - chosen, 0.0))
    if GRADIENT:
        # Every lane has read the target's logit before it is overwritten.
        tl.debug_barrier()
        for first in range(0, V, TOKENS):
            token = first + tl.arange(0, TOKENS)
            x = tl.load(logits + token, token < V, other=-float("inf")).to(tl.float32)
            grad = tl.exp(x - norm) - tl.where(token == target, 1.0, 0.0)
            grad = tl.where(live, grad, 0.0)
            tl.store(logits + token, grad.to(logits.dtype.element_ty), token < V)


def launch(logits_SV: Tensor, target_S: Tensor, gradient: bool) -> Tensor:
    """`cross_entropy` on checked arguments."""
    rows, vocabulary = logits_SV.shape
    loss_S = torch.empty(rows, dtype=torch.float32, device=logits_SV.device)
    tokens = min(4096, triton.next_power_of_2(vocabulary))
    _cross_entropy_kernel[(rows,)](
        logits_SV,
        target_S,
        loss_S,
        vocabulary,
        logits_SV.stride(0),
        GRADIENT=gradient,
        TOKENS=tokens,
        num_warps=max(1, min(8, tokens // 256)),
    )
    return loss_S
