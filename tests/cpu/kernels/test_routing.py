"""Sorting rows by expert and combining, Triton in the interpreter against PyTorch."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels.routing import (
    Rule,
    Spread,
    choose_experts,
    combine,
    group_rows,
    route,
    route_and_group,
)
from fourfold.kernels.routing.choose import ChoiceTile, choose_choice, sorts_at_once
from fourfold.kernels.routing.groups import RowGroups, choose_tile, most_tiles

triton_routing = pytest.importorskip("fourfold.kernels.routing.triton_routing")
triton_route = pytest.importorskip("fourfold.kernels.routing.triton_route")
launch_logits = pytest.importorskip("fourfold.kernels.routing.triton_logits").launch_logits
launch_route = triton_route.launch_route
launch_route_and_group = triton_route.launch_route_and_group
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
    ("tokens", "choices", "experts"),
    [(1, 1, 1), (1, 8, 128), (37, 3, 5), (400, 8, 20), (600, 8, 20)],
)
def test_rows_are_sorted_stably(
    tokens: int, choices: int, experts: int, index: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    experts_TK = torch.randint(experts, (tokens, choices)).to(index)
    tile = choose_tile(tokens * choices, experts)
    wanted = group_rows(experts_TK, experts)
    _assert_same(launch_group_rows(experts_TK, experts, tile), wanted)


@pytest.mark.parametrize("tokens", [1, 37, 600])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_rows_of_padding_belong_to_no_expert(tokens: int, share: float) -> None:
    torch.manual_seed(tokens)
    experts_TK = torch.randint(20, (tokens, 8))
    live_T = (torch.rand(tokens) < share).int()
    # Padding may name experts that there are not.
    experts_TK[live_T == 0] = 1 << 20
    alone = experts_TK[live_T != 0]
    for groups in (
        group_rows(experts_TK, 20, tile=16, live_T=live_T),
        launch_group_rows(experts_TK, 20, 16, live_T),
    ):
        rows = int(groups.ends_E[-1])
        assert rows == alone.numel()
        if rows == 0:
            assert bool((groups.tiles_3N[0] == -1).all())
            continue
        wanted = group_rows(alone, 20, tile=16)
        assert torch.equal(groups.ends_E, wanted.ends_E)
        place = torch.arange(tokens * 8).view(tokens, 8)[live_T != 0].flatten()
        assert torch.equal(groups.order_R[:rows].long(), place[wanted.order_R.long()])
        there = wanted.tiles_3N[:, wanted.tiles_3N[0] >= 0]
        assert torch.equal(groups.tiles_3N[:, : there.shape[1]], there)
        assert bool((groups.tiles_3N[0, there.shape[1] :] == -1).all())


@pytest.mark.parametrize("tokens", [40, 1000, 1025])
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


def test_padding_sums_to_zeros() -> None:
    out_TKD, gates_TK = torch.randn(5, 3, 304), torch.rand(5, 3)
    out_TKD[2] = float("nan")
    live_T = torch.tensor([1, 0, 0, 1, 1], dtype=torch.int32)
    for y_TD in (
        combine(out_TKD, gates_TK, out_dtype=torch.float32, live_T=live_T),
        launch_combine(out_TKD, gates_TK, torch.float32, live_T),
    ):
        assert not y_TD[1:3].any()
        wanted = combine(out_TKD, gates_TK, out_dtype=torch.float32)
        torch.testing.assert_close(y_TD[[0, 3, 4]], wanted[[0, 3, 4]])


# float16 stands for both formats of 16 bits: the interpreter multiplies no bfloat16.
RULES = [
    Rule(8),
    Rule(3, scale=2.5),
    Rule(1, normalise=False),
    Rule(2, "sigmoid"),
    Rule(4, "sigmoid", normalise=False, scale=0.5),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tokens", "width", "experts"),
    [(torch.float16, 1, 300, 128), (torch.float32, 19, 200, 60)],
)
def test_routes(
    dtype: torch.dtype,
    rule: Rule,
    biased: bool,
    spread: bool,
    tokens: int,
    width: int,
    experts: int,
) -> None:
    torch.manual_seed(tokens)
    x_TD, weight_ED = torch.randn(tokens, width).to(dtype), torch.randn(experts, width) / 8
    bias_E = torch.rand(experts) if biased else None
    ours, theirs = (Spread(5 << 20, torch.tensor(7)) if spread else None for _ in range(2))
    gates_TK, experts_TK = launch_route(x_TD, weight_ED, rule, bias_E, ours)
    wanted = route(x_TD, weight_ED, rule, bias_E=bias_E, spread=theirs)
    assert (gates_TK.dtype, experts_TK.dtype) == (torch.float32, torch.int64)
    assert torch.equal(experts_TK, wanted[1])
    torch.testing.assert_close(gates_TK, wanted[0], rtol=1e-4, atol=1e-9)
    if ours is not None:
        assert ours.steps.item() == 8


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("experts", [20, 600])
def test_tokens_that_share_a_program_choose_as_if_alone(
    monkeypatch: pytest.MonkeyPatch, experts: int, spread: bool
) -> None:
    """Many ties, and a last program that is not full."""
    torch.manual_seed(experts)
    x_TD = torch.randint(-1, 2, (7, 24)).float()
    weight_ED = torch.randint(-1, 2, (experts, 24)).float()
    bias_E = torch.randint(2, (experts,)).float()
    for rule, bias in ((Rule(8), None), (Rule(5, "sigmoid"), bias_E)):
        steps = Spread(3, torch.tensor(4)) if spread else None
        wanted = route(x_TD, weight_ED, rule, bias_E=bias, spread=steps)
        for together in (1, 4):
            tile = ChoiceTile(together, 1)
            monkeypatch.setattr(triton_route, "choose_choice", lambda *_, tile=tile: tile)
            steps = Spread(3, torch.tensor(4)) if spread else None
            gates_TK, experts_TK = launch_route(x_TD, weight_ED, rule, bias, steps)
            assert torch.equal(experts_TK, wanted[1])
            torch.testing.assert_close(gates_TK, wanted[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "rule"),
    [
        (1, 128, Rule(8)),
        (3, 20, Rule(8)),
        (8, 128, Rule(1)),
        (16, 128, Rule(8, "sigmoid", scale=2.5)),
        (13, 300, Rule(4, normalise=False)),
    ],
)
@pytest.mark.parametrize("share", [None, 0.0, 0.6])
def test_few_tokens_choose_and_are_sorted_at_once(
    tokens: int, experts: int, rule: Rule, share: float | None, spread: bool
) -> None:
    torch.manual_seed(tokens)
    x_TD, weight_ED = torch.randn(tokens, 24), torch.randn(experts, 24)
    bias_E = torch.rand(experts) if rule.score == "sigmoid" else None
    live_T = None if share is None else (torch.rand(tokens) < share).int()
    ours, theirs = (Spread(3, torch.tensor(4)) if spread else None for _ in range(2))
    gates_TK, experts_TK, groups = launch_route_and_group(
        x_TD, weight_ED, rule, bias_E, ours, live_T
    )
    wanted = route_and_group(x_TD, weight_ED, rule, bias_E=bias_E, spread=theirs, live_T=live_T)
    assert torch.equal(experts_TK, wanted[1])
    torch.testing.assert_close(gates_TK, wanted[0], rtol=1e-4, atol=1e-9)
    rows = int(groups.ends_E[-1])
    assert groups.tile == wanted[2].tile
    assert torch.equal(groups.ends_E, wanted[2].ends_E)
    assert torch.equal(groups.order_R[:rows], wanted[2].order_R[:rows])
    # Those of tiles that there are not, too: products may look them up.
    assert torch.equal(groups.tiles_3N, wanted[2].tiles_3N)


def test_only_few_scores_are_one_programs() -> None:
    assert sorts_at_once(1, 1024)
    assert sorts_at_once(16, 128)
    assert sorts_at_once(16, 8)
    assert not sorts_at_once(17, 8)
    assert not sorts_at_once(9, 200)
    assert not sorts_at_once(16, 129)


def test_more_tokens_share_a_program_once_there_are_programs_enough() -> None:
    assert {choose_choice(tokens, 128) for tokens in (1, 64, 256, 4095)} == {(1, 1)}
    assert choose_choice(16384, 128) == (4, 1)
    assert choose_choice(16384, 256) == (2, 1)
    assert choose_choice(16384, 1024) == (1, 4)


def test_ties_go_to_the_first_expert_and_nan_to_different_ones() -> None:
    x_TD = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [0.0, 0.0]])
    weight_ED = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    experts_TK = launch_route(x_TD, weight_ED, Rule(3), None, None)[1]
    assert experts_TK[0].tolist() == [1, 3, 0]
    assert len({*experts_TK[1].tolist()} & {*range(5)}) == 3
    assert experts_TK[2].tolist() == [0, 1, 2]
    assert torch.equal(route(x_TD[[0, 2]], weight_ED, Rule(3))[1], experts_TK[[0, 2]])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_choice_among_logits_is_the_routers(rule: Rule, biased: bool) -> None:
    torch.manual_seed(4)
    logits_TE = torch.randn(21, 60).round(decimals=1)  # with equals among them
    bias_E = torch.rand(60) if biased else None
    experts_TK = triton_route.launch_choose_experts(logits_TE, rule, bias_E)
    assert torch.equal(experts_TK, choose_experts(logits_TE, rule, bias_E=bias_E))
    assert torch.equal(experts_TK, route(logits_TE, torch.eye(60), rule, bias_E=bias_E)[1])
    none_TE = triton_route.launch_choose_experts(logits_TE[:0], rule, bias_E)
    assert none_TE.shape == (0, rule.choices)


def test_what_a_kernel_would_misread_is_refused() -> None:
    x_TD, weight_ED = torch.randn(3, 8), torch.randn(4, 8)
    with pytest.raises(AssertionError):
        route_and_group(x_TD[:0], weight_ED, Rule(2))
    with pytest.raises(AssertionError):
        route_and_group(x_TD, weight_ED, Rule(2), live_T=torch.ones(2).int())
    with pytest.raises(AssertionError):
        route(x_TD, weight_ED, Rule(2), bias_E=torch.zeros(3))
    with pytest.raises(AssertionError):
        combine(torch.zeros(3, 2, 8), torch.zeros(2, 2), out_dtype=torch.float32)


@pytest.mark.parametrize("tokens", [70, 530])
def test_logits_of_many_tokens(tokens: int) -> None:
    """Two more ways of cutting the product; the choice that follows is the same for any number."""
    torch.manual_seed(tokens)
    x_TD, weight_ED = torch.randn(tokens, 264).half(), torch.randn(20, 264) / 8
    options = {"COUNT": False, "EARLY": False, "launch_pdl": False}
    parts_STE = launch_logits(x_TD, weight_ED, weight_ED, options)
    assert parts_STE.shape[0] > 1
    torch.testing.assert_close(parts_STE.sum(0), x_TD.float() @ weight_ED.T, rtol=1e-4, atol=1e-4)
