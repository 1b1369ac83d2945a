"""One matrix product per expert over rows sorted by expert, without copying weights.

Shapes: R rows (a row is one token at one expert), I input width, O output width, E experts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def grouped_gemm(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows `ends[e-1] : ends[e]` times `weight[e].T`; returns [R, O] in the dtype of `x_RI`.

    `ends_E` int32 on the device of the rows, non-decreasing, the last equal to R. On a GPU torch
    needs bfloat16 and never reads `ends_E` on the host.
    """
    return F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=ends_E)
