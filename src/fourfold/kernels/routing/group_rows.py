"""Counting sort of (token, choice) rows by expert, on the device and stable.

Few rows are placed by comparing all pairs, in one launch. Many are counted in chunks, the counts
summed over the chunks, and each chunk then places its rows. Nothing depends on the order in which
programs run, so the result is always the same.

Shapes: T tokens, K choices of a token, R = T * K rows, E experts.
"""

from __future__ import annotations

from torch import Tensor

from fourfold.kernels.routing import reference
from fourfold.kernels.routing.groups import RowGroups, choose_tile


def group_rows(
    experts_TK: Tensor,
    experts: int,
    *,
    tile: int | None = None,
    live_T: Tensor | None = None,
) -> RowGroups:
    """Sorts rows by their expert.

    Args:
        experts_TK: int32 or int64 [T, K], contiguous, each in 0..experts-1.
        experts: number of experts, at most 1024.
        tile: rows of a tile; by default what suits the mean rows of an expert.
        live_T: int32 [T], 0 for tokens that only pad a step: their rows belong to no expert and lie
            in no tile, whatever experts they name; what the order holds past the last end is
            arbitrary.
    """
    rows = experts_TK.numel()
    assert experts_TK.is_contiguous(), experts_TK.shape
    assert rows > 0, experts_TK.shape
    assert 0 < experts <= 1024, experts
    assert live_T is None or live_T.shape == experts_TK.shape[:1], live_T
    if not experts_TK.is_cuda:
        return reference.group_rows(experts_TK, experts, tile=tile, live_T=live_T)
    from fourfold.kernels.routing.triton_routing import launch_group_rows

    return launch_group_rows(experts_TK, experts, tile or choose_tile(rows, experts), live_T)
