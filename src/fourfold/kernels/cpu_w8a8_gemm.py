"""Matrix product of 8-bit activations and 8-bit weights with exact int32 accumulation, on a CPU.

Activations are quantised per token just before the product, weights per output channel at load:
`y_TO = (a_TI @ w_OI.T) * scale_T * scale_O`. The int32 sums are exact, so a token's result does not
depend on which other tokens share the batch. oneDNN computes them with weights packed once, which
needs activations as unsigned codes with a zero point. It is exact only where the CPU has VNNI
(without, pairs of products saturate at 16 bits); `exact_on_cpu` asks the machine, not a table.
Elsewhere the codes are multiplied in float32, which is as good and not faster than dense weights.

Shapes: T tokens, I input width, O output width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fourfold.kernels.own_thread import on_own_thread

LIMIT = 127
ZERO_POINT = 128
_SMALLEST = 1e-30


def quantize_per_token(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric codes with one float32 scale a row: `x ~ (codes - 128) * scale`.

    Returns codes uint8 [T, I] in 1..255 and scale float32 [T, 1]; a row of zeros has codes 128.
    """
    x_TI = x_TI.float()
    scale_T1 = x_TI.abs().amax(-1, keepdim=True).div_(LIMIT).clamp_min_(_SMALLEST)
    # Adding a half and cutting off rounds to the nearest code, in one pass less.
    codes_TI = torch.addcmul(_half_up(), x_TI, scale_T1.reciprocal())
    return codes_TI.to(torch.uint8), scale_T1


def pack_weight(weight_OI: Tensor) -> Tensor:
    """Int8 weights [O, I] in the layout that the product reads fastest (opaque)."""
    return _pack(weight_OI) if exact_on_cpu() else weight_OI.float()


def cpu_w8a8_gemm(codes_TI: Tensor, scale_T1: Tensor, packed: Tensor, scale_O: Tensor) -> Tensor:
    """Returns float32 [T, O]; exact up to the scaling. `packed` comes from `pack_weight`, `scale_O`
    is float32."""
    if not packed.is_mkldnn:
        return ((codes_TI.float() - ZERO_POINT) @ packed.T).mul_(scale_O).mul_(scale_T1)
    return _product(codes_TI, packed, scale_O).mul_(scale_T1)


def _pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight_OI, None)
    return packed


def _product(codes_TI: Tensor, packed: Tensor, scale_O: Tensor) -> Tensor:
    zero_O = _zeros(scale_O.shape[0])
    y_TO: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes_TI,
        1.0,
        ZERO_POINT,
        packed,
        scale_O,
        zero_O,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return y_TO


@functools.cache
def _half_up() -> Tensor:
    return torch.tensor(ZERO_POINT + 0.5)


@functools.cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32)


@functools.cache
def exact_on_cpu() -> bool:
    """Whether the product is exact on this CPU: tried on the inputs that saturate first."""
    return torch._C._has_mkldnn and on_own_thread(_is_exact)


def _is_exact() -> bool:
    packed = _pack(torch.full((64, 256), -LIMIT, dtype=torch.int8))
    for rows in (1, 2, 32):
        codes = torch.full((rows, 256), ZERO_POINT + LIMIT, dtype=torch.uint8)
        sums = _product(codes, packed, torch.ones(64))
        if not bool((sums == -256 * LIMIT * LIMIT).all()):
            return False
    return True
