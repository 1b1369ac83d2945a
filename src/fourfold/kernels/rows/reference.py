"""Rows in 8 bits, in plain PyTorch: what the CPU computes and what the Triton kernels must equal.

Codes come from one multiplication by the row's `largest / amax`, rounded half to even, scales from
one by `1 / largest`; the Triton kernels do the same, so their codes are the same bits (a sum, as in
a norm or a turn, may be added up in another order).

Shapes: T rows, K channels, padded to W, D model width, b = 32 channels that are turned together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels.routing.reference import combine

SMALLEST = 1e-30
"""What takes the place of the largest magnitude of a row of zeros."""


class Rows(NamedTuple):
    """Rows in 8 bits: `x ~ codes * scale`."""

    codes_TW: Tensor
    """int8 in -127..127 or float8_e4m3fn [T, W]; zeros from channel K on."""
    scale_T: Tensor
    """float32 [T], positive."""


class NormedRows(NamedTuple):
    """What comes out of a norm."""

    normed_TD: Tensor | None
    """The normed rows in the dtype of the input, where they were asked for."""
    rows: Rows
    """The normed rows in 8 bits; of the float32 values, before any rounding to 16 bits."""
    residual_TD: Tensor
    """What was normed: the input, or its sum with the residual rounded to the input's dtype."""


def largest_code(dtype: torch.dtype) -> float:
    """The code that stands for a row's largest magnitude."""
    return 127.0 if dtype == torch.int8 else 448.0


def quantize_rows(
    x_TK: Tensor,
    dtype: torch.dtype,
    width: int,
    *,
    turn_bb: Tensor | None = None,
    swiglu: bool = False,
) -> Rows:
    """Codes of rows [T, K], symmetric, one scale a row; see `fourfold.kernels.rows`."""
    if swiglu:
        gate_TK, up_TK = x_TK.float().chunk(2, 1)
        x_TK = (F.silu(gate_TK) * up_TK).to(x_TK.dtype)
    x_TK = x_TK.float()
    if turn_bb is not None:
        x_TK = (x_TK.reshape(-1, turn_bb.shape[0]) @ turn_bb).view(x_TK.shape)
    largest = largest_code(dtype)
    amax_T1 = x_TK.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    # `largest / amax_T1` and, on a GPU, `amax_T1 / largest` would be products with reciprocals.
    codes_TK = x_TK * torch.full_like(amax_T1, largest).div_(amax_T1)
    if dtype == torch.int8:
        codes_TK = codes_TK.round_()
    codes_TW = F.pad(codes_TK, (0, width - x_TK.shape[1])).to(dtype)
    return Rows(codes_TW, (amax_T1 * (1 / largest)).squeeze(-1))


def rms_norm_quantize(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    width: int,
    *,
    residual_TD: Tensor | None = None,
    keep_normed: bool = False,
    gates_TK: Tensor | None = None,
    live_T: Tensor | None = None,
) -> NormedRows:
    """Residual sum, RMSNorm and codes of its rows; see `fourfold.kernels.rows`."""
    if gates_TK is not None:
        x_TD = combine(x_TD, gates_TK, out_dtype=x_TD.dtype, live_T=live_T)
    summed_TD = x_TD if residual_TD is None else x_TD + residual_TD
    y_TD = summed_TD.float()
    y_TD = y_TD * torch.rsqrt(y_TD.square().mean(-1, keepdim=True) + eps) * weight_D.float()
    return NormedRows(
        y_TD.to(x_TD.dtype) if keep_normed else None,
        quantize_rows(y_TD, dtype, width),
        summed_TD,
    )
