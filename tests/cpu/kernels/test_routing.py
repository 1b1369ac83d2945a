"""Sorting rows by expert and combining, Triton in the interpreter against PyTorch."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels.routing import combine, group_rows
from fourfold.kernels.routing.groups import RowGroups, choose_tile, most_tiles

triton_routing = pytest.importorskip("fourfold.kernels.routing.triton_routing")
launch_combine = triton_routing.launch_combine
launch_group_rows = triton_routing.launch_group_rows


def _assert_same(groups: RowGroups, wanted: RowGroups) -> None:
    assert groups.tile == wanted.tile
    assert torch.equal(groups.order_R, wanted.order_R)
    assert torch.equal(groups.ends_E, wanted.ends_E)
    there = wanted.tiles_3N[0] >= 0
    assert torch.equal(groups.tiles_3N[0], wanted.tiles_3N[0])
    assert torch.equal(groups.tiles_3N[:, there], wanted.tiles_3N[:, there])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "choices", "experts"), [(1, 1, 1), (1, 8, 128), (37, 3, 5), (600, 8, 20)]
)
def test_rows_are_sorted_stably(
    tokens: int, choices: int, experts: int, index: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    experts_TK = torch.randint(experts, (tokens, choices)).to(index)
    tile = choose_tile(tokens * choices, experts)
    wanted = group_rows(experts_TK, experts)
    _assert_same(launch_group_rows(experts_TK, experts, tile), wanted)


@pytest.mark.parametrize("tokens", [40, 1025])
def test_all_rows_may_go_to_one_expert(tokens: int) -> None:
    experts_TK = torch.full((tokens, 4), 5)
    _assert_same(launch_group_rows(experts_TK, 9, 64), group_rows(experts_TK, 9, tile=64))


def test_tiles_grow_with_the_rows_of_an_expert() -> None:
    tiles = [choose_tile(tokens * 8, 128) for tokens in (1, 16, 256, 1024, 4096, 16384)]
    assert tiles == sorted(tiles)
    assert tiles[0] == 16
    assert tiles[-1] == 128


def test_no_routing_makes_more_tiles_than_there_is_room_for() -> None:
    assert most_tiles(1, 128, 16) == 1
    # Seven experts with one row each, one with the others.
    assert most_tiles(7 + 33, 8, 16) >= 7 + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_combine_sums_in_order(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out_TKD, gates_TK = torch.randn(5, 3, 304).to(dtype), torch.rand(5, 3)
    y_TD = launch_combine(out_TKD, gates_TK, dtype)
    assert y_TD.dtype == dtype
    # The interpreter cuts bfloat16 off instead of rounding it.
    wanted = combine(out_TKD, gates_TK, out_dtype=torch.float64)
    torch.testing.assert_close(
        y_TD.double(), wanted, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-6
    )
