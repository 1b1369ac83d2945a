"""Rows of a token added up in Triton, each read once; a program takes some tokens.

Shapes: T tokens, K choices of a token, D width.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048


@triton.jit(do_not_specialize=["T"])
def _sum_rows_kernel(
    rows,
    places,
    y,
    T,
    D: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (token < T)[:, None] & (channel < D)[None, :]
    sum_TD = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for choice in tl.static_range(K):
        place = tl.load(places + token * K + choice, token < T, other=0)
        row_TD = rows + place[:, None] * D + channel[None, :]
        sum_TD += tl.load(row_TD, inside, other=0.0).to(tl.float32)
    tl.store(y + token[:, None] * D + channel[None, :], sum_TD.to(y.dtype.element_ty), inside)


def launch(rows_RD: Tensor, place_TK: Tensor) -> Tensor:
    """`sum_rows` on checked arguments."""
    tokens, choices = place_TK.shape
    width = rows_RD.shape[1]
    y_TD = torch.empty((tokens, width), dtype=rows_RD.dtype, device=rows_RD.device)
    channels = min(_TILE, triton.next_power_of_2(width))
    together = _TILE // channels
    _sum_rows_kernel[(triton.cdiv(tokens, together), triton.cdiv(width, channels))](
        rows_RD,
        place_TK,
        y_TD,
        tokens,
        D=width,
        K=choices,
        TOKENS=together,
        CHANNELS=channels,
        num_warps=8,
    )
    return y_TD
