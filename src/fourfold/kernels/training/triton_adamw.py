"""AdamW in Triton: all that an update reads and writes, once.

Shapes: N numbers of one weight.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _adamw_kernel(
    master,
    grad,
    mean,
    square,
    rounded,
    numbers_4,
    N,
    beta1,
    beta2,
    eps,
    decay,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    rate = tl.load(numbers_4 + 1)
    of_mean = tl.load(numbers_4 + 2)
    of_root = tl.load(numbers_4 + 3)
    g = tl.load(grad + place, inside, other=0.0).to(tl.float32) * tl.load(numbers_4)
    m = tl.load(mean + place, inside, other=0.0)
    v = tl.load(square + place, inside, other=0.0)
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    w = tl.load(master + place, inside, other=0.0) * (1.0 - rate * decay)
    w -= rate * of_mean * m / (tl.sqrt(v) * of_root + eps)
    tl.store(mean + place, m, inside)
    tl.store(square + place, v, inside)
    tl.store(master + place, w, inside)
    if ROUND:
        tl.store(rounded + place, w.to(rounded.dtype.element_ty), inside)


def launch(
    master: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    rounded: Tensor | None,
    numbers_4: Tensor,
    **constants: float,
) -> None:
    """`adamw` on checked arguments; `constants` as `reference.adamw` takes them."""
    count = master.numel()
    if count == 0:
        return
    _adamw_kernel[(triton.cdiv(count, _BLOCK),)](
        master,
        grad,
        mean,
        square,
        master if rounded is None else rounded,
        numbers_4,
        count,
        **constants,
        ROUND=rounded is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )
