"""Moving pages from one memory of a device to another, with a hash of what was read.

Shapes: L layers, P and Q pages of either memory, R bytes of a record, J pages that move.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 128


def move_pages(target_LPR: Tensor, to_J: Tensor, source_LQR: Tensor, from_J: Tensor) -> Tensor:
    """Copies page `from_J[j]` of the source to page `to_J[j]` of the target, in every layer.

    Both are uint8 with contiguous records of the same size, a multiple of 128 bytes; they may lie
    on different devices that can read each other, and then the target's computes. `from_J` and
    `to_J` are int64 on that device; no two pages may go to the same. Returns `hash_pages` of what
    was read. No host synchronisation.
    """
    _check(target_LPR, to_J)
    _check(source_LQR, from_J)
    assert to_J.shape == from_J.shape
    assert target_LPR.shape[0] == source_LQR.shape[0]
    assert target_LPR.shape[2] == source_LQR.shape[2], "records of another size"
    if target_LPR.is_cuda:
        from fourfold.kernels.pages.triton_move import launch_move

        return launch_move(target_LPR, to_J, source_LQR, from_J)
    target_LPR[:, to_J] = source_LQR[:, from_J]
    return reference_hash(source_LQR, from_J)


def hash_pages(source_LQR: Tensor, from_J: Tensor) -> Tensor:
    """A hash of each page's record in every layer, int32 [L, J, 2]: the sum of its 32-bit words,
    and the sum of the words times the odd numbers 1, 3, 5, .., modulo 2^32.

    Arguments as in `move_pages`. Any single changed word changes it, and so do words that changed
    places.
    """
    _check(source_LQR, from_J)
    if source_LQR.is_cuda:
        from fourfold.kernels.pages.triton_move import launch_move

        return launch_move(None, None, source_LQR, from_J)
    return reference_hash(source_LQR, from_J)


def reference_hash(source_LQR: Tensor, from_J: Tensor) -> Tensor:
    """`hash_pages` in plain PyTorch."""
    words_LJW = source_LQR[:, from_J].view(torch.int32).long()
    odd_W = 2 * torch.arange(words_LJW.shape[-1], device=words_LJW.device) + 1
    sums_LJ2 = torch.stack((words_LJW.sum(-1), (words_LJW * odd_W).sum(-1)), dim=-1)
    return sums_LJ2.to(torch.int32)


def _check(records_LPR: Tensor, pages_J: Tensor) -> None:
    assert records_LPR.dtype == torch.uint8
    assert records_LPR.shape[2] % _ALIGNMENT == 0, "records must be multiples of 128 bytes"
    assert records_LPR.stride()[1:] == (records_LPR.shape[2], 1), "records must be contiguous"
    assert records_LPR.stride(0) % records_LPR.shape[2] == 0, "layers must be whole pages apart"
    assert pages_J.dtype == torch.int64
    assert pages_J.is_contiguous()
