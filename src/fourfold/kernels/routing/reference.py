"""The verbs of routing in plain PyTorch: the oracle of the kernels, and what a CPU runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.routing.groups import RowGroups, choose_tile, most_tiles


def group_rows(experts_TK: Tensor, experts: int, *, tile: int | None = None) -> RowGroups:
    """See `fourfold.kernels.routing.group_rows`."""
    flat_R = experts_TK.flatten()
    tile = tile or choose_tile(flat_R.numel(), experts)
    sizes_E = torch.bincount(flat_R, minlength=experts)
    ends_E = sizes_E.cumsum(0)
    tiles = [
        (expert, first, end)
        for expert, (size, end) in enumerate(zip(sizes_E.tolist(), ends_E.tolist(), strict=True))
        for first in range(end - size, end, tile)
    ]
    tiles_3N = flat_R.new_zeros((3, most_tiles(flat_R.numel(), experts, tile)), dtype=torch.int32)
    tiles_3N[0] = -1
    tiles_3N[:, : len(tiles)] = torch.tensor(tiles, dtype=torch.int32).T
    return RowGroups(
        flat_R.argsort(stable=True).to(torch.int32), ends_E.to(torch.int32), tile, tiles_3N
    )


def combine(out_TKD: Tensor, gates_TK: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """See `fourfold.kernels.routing.combine`."""
    return (out_TKD.double() * gates_TK.double()[..., None]).sum(1).to(out_dtype)
