"""The W4A8 products in plain PyTorch: the oracle of the kernels, and what a CPU runs.

Sums are taken in float64, in which those of INT8 codes are exact; only then are they scaled.

Shapes: T tokens, R rows sorted by expert, E experts, O outputs, K padded input channels, F hidden
width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels.routing.groups import RowGroups
from fourfold.kernels.w4a8_gemm.packing import PackedW4A8, decode_nibbles, unpack_nibbles


def w4a8_gemm(
    codes_TK: Tensor, scale_T: Tensor, weight: PackedW4A8, *, out_dtype: torch.dtype
) -> Tensor:
    """See `gemm.w4a8_gemm`."""
    return _scaled(codes_TK, scale_T, _codes(weight)[0], weight.scale_EO[0]).to(out_dtype)


def w8a8_gemm(
    codes_TK: Tensor,
    scale_T: Tensor,
    weight_OK: Tensor,
    scale_O: Tensor,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `gemm.w8a8_gemm`."""
    return _scaled(codes_TK, scale_T, weight_OK.double(), scale_O).to(out_dtype)


def grouped_w4a8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: PackedW4A8,
    groups: RowGroups,
    *,
    gather: int | None,
    scatter: bool,
    swiglu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `gemm.grouped_w4a8_gemm`; rows of no expert are zeros."""
    ends = groups.ends_E.tolist()
    # What lies past the last end is nobody's.
    order_R = groups.order_R[: ends[-1]].long()
    if gather is not None:
        codes, scale = codes[order_R // gather], scale[order_R // gather]
    weight_EOK = _codes(weight)
    rows = []
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        of_expert = slice(start, end)
        rows.append(
            _scaled(codes[of_expert], scale[of_expert], weight_EOK[expert], weight.scale_EO[expert])
        )
    y_RO = torch.cat(rows)
    if swiglu:
        gate_RF, up_RF = y_RO.chunk(2, -1)
        y_RO = F.silu(gate_RF) * up_RF
    out_RO = y_RO.new_zeros((groups.order_R.numel(), y_RO.shape[1]))
    out_RO[order_R if scatter else slice(ends[-1])] = y_RO
    return out_RO.to(out_dtype)


def _codes(weight: PackedW4A8) -> Tensor:
    nibbles_EOK = unpack_nibbles(weight.packed_EBOJ, weight.recipe)
    return decode_nibbles(nibbles_EOK, weight.group_EGO, weight.recipe).double()


def _scaled(codes_TK: Tensor, scale_T: Tensor, weight_OK: Tensor, scale_O: Tensor) -> Tensor:
    """float32, scaled as the kernels do."""
    sums_TO = (codes_TK.double() @ weight_OK.T).float()
    return sums_TO * (scale_T.float()[:, None] * scale_O.float())
