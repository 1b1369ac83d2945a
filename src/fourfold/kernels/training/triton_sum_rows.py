"""Rows of a token added up in Triton, each read once.

Shapes: T tokens, K choices of a token, D width.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(rows, places, y, D, K: tl.constexpr, CHANNELS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    sum_D = tl.zeros([CHANNELS], tl.float32)
    for choice in tl.static_range(K):
        place = tl.load(places + token * K + choice)
        sum_D += tl.load(rows + place * D + channel, channel < D, other=0.0).to(tl.float32)
    tl.store(y + token * D + channel, sum_D.to(y.dtype.element_ty), channel < D)


def launch(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    """`sum_rows` on checked arguments."""
    tokens, choices = place_TK.shape
    width = rows_RD.shape[1]
    y_TD = torch.empty((tokens, width), dtype=rows_RD.dtype, device=rows_RD.device)
    channels = min(2048, triton.next_power_of_2(width))
    _kernel[(tokens, triton.cdiv(width, channels))](
        rows_RD,
        place_TK,
        y_TD,
        width,
        K=choices,
        CHANNELS=channels,
        num_warps=max(1, min(8, channels // 256)),
    )
    return y_TD
