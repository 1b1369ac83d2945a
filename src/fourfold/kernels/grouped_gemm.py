"""One matrix product per expert over rows sorted by expert, without copying weights.

Shapes: R rows (a row is one token at one expert), I input width, O output width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# torch's product refuses rows that are not whole multiples of so many bytes.
_ALIGNMENT = 16


def grouped_gemm(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows `ends[e-1] : ends[e]` times `weight[e].T`; returns [R, O] in the dtype of `x_RI`.

    `ends_E` int32 on the device of the rows, non-decreasing, the last equal to R. On a GPU torch
    needs bfloat16 and widths of whole 16 bytes, and never reads `ends_E` on the host.
    """
    if not x_RI.is_cuda and any(n * x_RI.itemsize % _ALIGNMENT for n in weight_EOI.shape[1:]):
        rows = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        parts = zip(torch.split(x_RI, rows), weight_EOI, strict=True)
        return torch.cat([F.linear(x_rI, weight_OI) for x_rI, weight_OI in parts])
    return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=ends_E)
