"""The weighted sum of what a token's experts return.

A pass of its own rather than atomic additions in the product's epilogue: the order of additions is
fixed, so the sum is the same bit for bit in every run.

Shapes: T tokens, K choices of a token, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.routing import reference


def combine(
    out_TKD: Tensor,
    gates_TK: Tensor,
    *,
    out_dtype: torch.dtype,
    live_T: Tensor | None = None,
) -> Tensor:
    """Sums `gates * out` over the choices, in float32 and in their order; returns [T, D].

    Args:
        out_TKD: [T, K, D], contiguous, any float dtype.
        gates_TK: [T, K], contiguous, any float dtype.
        out_dtype: of the result.
        live_T: int32 [T], 0 for tokens whose rows nobody wrote: their sums are zeros.
    """
    assert out_TKD.is_contiguous(), out_TKD.shape
    assert gates_TK.is_contiguous(), gates_TK.shape
    assert gates_TK.shape == out_TKD.shape[:2], (gates_TK.shape, out_TKD.shape)
    assert live_T is None or live_T.shape == out_TKD.shape[:1], live_T.shape
    if not out_TKD.is_cuda:
        return reference.combine(out_TKD, gates_TK, out_dtype=out_dtype, live_T=live_T)
    from fourfold.kernels.routing.triton_routing import launch_combine

    return launch_combine(out_TKD, gates_TK, out_dtype, live_T)
