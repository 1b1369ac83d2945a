"""Tokens that a step begins with: the host's, or those that were drawn on the device.

Shapes: T rows, N slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def newest_tokens(tokens_T: Tensor, sources_T: Tensor, last_N: Tensor) -> Tensor:
    """Of each row its token, or the last one of slot `sources_T[t]` where that is not negative.

    `tokens_T` and `sources_T` are int32, `last_N` int64, all on one device; returns int64 [T].
    """
    assert tokens_T.shape == sources_T.shape
    assert tokens_T.dtype == sources_T.dtype == torch.int32
    assert last_N.dtype == torch.int64
    if tokens_T.is_cuda:
        from fourfold.kernels.sample.triton_newest import launch

        return launch(tokens_T, sources_T, last_N)
    return torch.where(sources_T >= 0, last_N[sources_T.clamp_min(0)], tokens_T)
