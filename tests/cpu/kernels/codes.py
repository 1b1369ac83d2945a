"""Comparing 8-bit codes from Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor


def same_codes(ours: Tensor, theirs: Tensor) -> bool:
    """Whether codes are the same bits, as far as the interpreter (3.6) can tell.

    It rounds to float8 half up instead of to even, and wrongly where a mantissa overflows (124.3
    becomes 64 instead of 128) or is subnormal. So one neighbour, or half of a power of two, is
    forgiven of float8; on a GPU the bits must be equal.
    """
    assert ours.dtype == theirs.dtype
    if ours.dtype == torch.int8:
        return torch.equal(ours, theirs)
    step = (ours.view(torch.uint8).int() - theirs.view(torch.uint8).int()).abs()
    ours, theirs = ours.float(), theirs.float()
    carried = (theirs == 2 * ours) & (theirs.abs().log2() == theirs.abs().log2().round())
    tiny = (theirs - ours).abs() <= 2.0**-9
    return bool(((step <= 1) | carried | tiny).all())
