"""Routing on a GPU: choices as in float32, padding that touches nothing, and sums in the norm."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels.routing import (
    Rule,
    Spread,
    combine,
    group_rows,
    reference,
    route,
    route_and_group,
)
from fourfold.kernels.rows import rms_norm_quantize
from tests.gpu.test_rows import poison, same

RULES = [Rule(8), Rule(4, "sigmoid", scale=2.5), Rule(2, normalise=False)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 256, 5000])
def test_routes(rule: Rule, biased: bool, spread: bool, tokens: int) -> None:
    torch.manual_seed(tokens)
    x_TD = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    weight_ED = torch.randn(128, 2048, device="cuda") / 45
    bias_E = torch.rand(128, device="cuda") if biased else None
    steps = [torch.full((), 3, device="cuda") for _ in range(2)]
    poison()
    gates_TK, experts_TK = route(
        x_TD, weight_ED, rule, bias_E=bias_E, spread=Spread(7 << 20, steps[0]) if spread else None
    )
    gates, experts = reference.route(
        x_TD,
        weight_ED,
        rule,
        bias_E=bias_E,
        spread=Spread(7 << 20, steps[1]) if spread else None,
    )
    assert torch.equal(*steps)
    # Neighbours in the last digits may change places, and have gates of their own under a bias.
    differ_T = (experts_TK != experts).any(1)
    assert differ_T.float().mean() < 2e-3
    torch.testing.assert_close(gates_TK[~differ_T], gates.float()[~differ_T], rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("experts", [60, 128, 256])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16, 17])
@pytest.mark.parametrize("padded", [False, True])
def test_few_tokens_choose_and_are_sorted_at_once(tokens: int, experts: int, padded: bool) -> None:
    torch.manual_seed(tokens)
    x_TD = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    weight_ED = torch.randn(experts, 2048, device="cuda") / 45
    live_T = (torch.rand(tokens, device="cuda") < 0.6).int() if padded else None
    poison()
    gates_TK, experts_TK, groups = route_and_group(x_TD, weight_ED, Rule(8), live_T=live_T)
    alone = route(x_TD, weight_ED, Rule(8))
    assert torch.equal(experts_TK, alone[1])
    torch.testing.assert_close(gates_TK, alone[0], rtol=1e-6, atol=0)
    live = None if live_T is None else live_T.cpu()
    wanted = reference.group_rows(experts_TK.cpu(), experts, live_T=live)
    rows = int(wanted.ends_E[-1])
    assert groups.tile == wanted.tile
    assert torch.equal(groups.ends_E.cpu(), wanted.ends_E)
    assert torch.equal(groups.order_R[:rows].cpu(), wanted.order_R[:rows])
    there = wanted.tiles_3N[0] >= 0
    assert torch.equal(groups.tiles_3N[0].cpu(), wanted.tiles_3N[0])
    assert torch.equal(groups.tiles_3N.cpu()[:, there], wanted.tiles_3N[:, there])


def test_a_graph_goes_on_counting_steps() -> None:
    x_TD = torch.randn(9, 256, device="cuda", dtype=torch.bfloat16)
    weight_ED = torch.randn(60, 256, device="cuda")
    spread = Spread(1, torch.zeros((), dtype=torch.int64, device="cuda"))
    route(x_TD, weight_ED, Rule(4), spread=spread)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gates_TK, experts_TK = route(x_TD, weight_ED, Rule(4), spread=spread)
    seen = []
    for step in (2, 3):
        graph.replay()
        assert spread.steps.item() == step
        seen.append(experts_TK.clone())
        again = Spread(1, torch.full((), step - 1, device="cuda"))
        wanted = reference.route(x_TD, weight_ED, Rule(4), spread=again)
        assert torch.equal(experts_TK.sort().values, wanted[1].sort().values)
        torch.testing.assert_close(gates_TK.sum(-1), torch.ones(9, device="cuda"))
    assert not torch.equal(*seen)


@pytest.mark.parametrize("tokens", [3, 256, 3000])
def test_rows_of_padding_belong_to_no_expert(tokens: int) -> None:
    torch.manual_seed(tokens)
    experts_TK = torch.rand(tokens, 50, device="cuda").topk(8).indices
    live_T = (torch.rand(tokens, device="cuda") < 0.5).int()
    experts_TK[live_T == 0] = -(1 << 40)
    poison()
    groups = group_rows(experts_TK, 50, live_T=live_T)
    wanted = reference.group_rows(experts_TK.cpu(), 50, live_T=live_T.cpu())
    rows = int(wanted.ends_E[-1])
    assert torch.equal(groups.ends_E.cpu(), wanted.ends_E)
    assert torch.equal(groups.order_R[:rows].cpu(), wanted.order_R[:rows])
    assert torch.equal(groups.tiles_3N[0].cpu(), wanted.tiles_3N[0])
    there = wanted.tiles_3N[0] >= 0
    assert torch.equal(groups.tiles_3N.cpu()[:, there], wanted.tiles_3N[:, there])


@pytest.mark.parametrize("tokens", [1, 64, 4000])
@pytest.mark.parametrize("padded", [False, True])
def test_a_norm_of_what_experts_returned(tokens: int, padded: bool) -> None:
    torch.manual_seed(tokens)
    out_TKD = torch.randn(tokens, 8, 2048, device="cuda", dtype=torch.bfloat16)
    gates_TK = torch.rand(tokens, 8, device="cuda")
    live_T = (torch.rand(tokens, device="cuda") < 0.5).int() if padded else None
    if live_T is not None:
        out_TKD[live_T == 0] = float("nan")
    residual_TD = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    weight_D = torch.rand(2048, device="cuda") + 0.5
    norm = (weight_D, 1e-6, torch.int8, 2048)
    summed_TD = combine(out_TKD, gates_TK, out_dtype=torch.bfloat16, live_T=live_T)
    plain = rms_norm_quantize(summed_TD, *norm, residual_TD=residual_TD)
    poison()
    ours = rms_norm_quantize(
        out_TKD, *norm, residual_TD=residual_TD, gates_TK=gates_TK, live_T=live_T
    )
    assert torch.equal(ours.residual_TD, plain.residual_TD)
    assert same(ours.rows, plain.rows)
