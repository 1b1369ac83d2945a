"""Matrix product of 8-bit activations and 8-bit weights with exact int32 accumulation.

Activations are quantised per token just before the product, weights per output channel at load:
`y_TO = (a_TI @ w_OI.T) * scale_T * scale_O`. The int32 sums are exact, so a token's result does not
depend on which other tokens share the batch. torch dispatches `_int_mm` to oneDNN, which is exact
only where the CPU has VNNI (without it, pairs of products saturate at 16 bits); `exact_on_cpu`
asks the machine rather than a table.

Shapes: T tokens, I input width, O output width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LIMIT = 127


def quantize_per_token(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes with one float32 scale a row: `x ~ codes * scale`.

    Returns codes int8 [T, I] and scale float32 [T, 1]; a row of zeros has scale 0 and codes 0.
    """
    x_TI = x_TI.float()
    scale_T1 = x_TI.abs().amax(-1, keepdim=True).div_(LIMIT)
    codes_TI = torch.div(x_TI, scale_T1.clamp_min(torch.finfo(torch.float32).tiny))
    return codes_TI.round_().to(torch.int8), scale_T1


def w8a8_gemm(codes_TI: Tensor, scale_T1: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Returns float32 [T, O]. `weight_OI` int8, `scale_O` float32 [O]; exact up to the scaling."""
    sums_TO = torch._int_mm(codes_TI, weight_OI.t())
    return (sums_TO * scale_T1).mul_(scale_O)


@functools.cache
def exact_on_cpu() -> bool:
    """Whether `_int_mm` sums exactly on this CPU: tried on the inputs that saturate first."""
    codes = torch.full((32, 256), LIMIT, dtype=torch.int8)
    weight = torch.full((64, 256), -LIMIT, dtype=torch.int8)
    for rows in (1, 2, 32):
        if not bool((torch._int_mm(codes[:rows], weight.t()) == -256 * LIMIT * LIMIT).all()):
            return False
    return True
