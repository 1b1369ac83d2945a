"""Sums of gradients in Triton: read once and written once, whatever their dtypes.

Shapes: N numbers of one weight.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _accumulate_kernel(total, first, second, N, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    a = tl.load(first + place, inside, other=0.0).to(tl.float32)
    b = tl.load(second + place, inside, other=0.0).to(tl.float32)
    tl.store(total + place, a + b, inside)


def launch(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Puts first + second into `total`, which may be one of them."""
    count = total.numel()
    if count == 0:
        return
    _accumulate_kernel[(triton.cdiv(count, _BLOCK),)](
        total, first, second, count, BLOCK=_BLOCK, num_warps=8
    )
