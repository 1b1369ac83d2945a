"""Attention of one layer, from queries, keys and values that are not to be changed."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.quadrants.projection import Projected
from fourfold.quadrants.step import QuadrantStep
from fourfold.quantize.weights import DenseWeight


def attend(step: QuadrantStep, layer: int, q_THC: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> Tensor:
    """Attention of the step's rows, [T, H, C]; angles are zero."""
    tokens, heads, width = q_THC.shape
    projected = Projected(
        torch.cat([x.flatten(1) for x in (q_THC, k_TGC, v_TGC)], 1),
        heads,
        k_TGC.shape[1],
        width,
        torch.ones(tokens, width),
        torch.zeros(tokens, width),
    )
    reader = DenseWeight(torch.empty(1, heads * width))
    return step.attention(layer, projected, reader).kept.view(q_THC.shape)
