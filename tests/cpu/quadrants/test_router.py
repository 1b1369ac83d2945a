"""Every option of the router against plain arithmetic, and the one that spreads tokens evenly."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from fourfold.models.config import MoEConfig
from fourfold.models.router import Router, UniformRouter

EXPERTS, WIDTH = 8, 16


def plain_route(
    logits: list[float], bias: list[float], config: MoEConfig
) -> list[tuple[int, float]]:
    """(expert, gate) of one token, the best first."""
    if config.score == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        total = sum(math.exp(logit) for logit in logits)
        scores = [math.exp(logit) / total for logit in logits]
    order = sorted(range(len(logits)), key=lambda expert: -(scores[expert] + bias[expert]))
    chosen = order[: config.experts_per_token]
    total = sum(scores[expert] for expert in chosen) if config.normalise else 1.0
    return [(expert, scores[expert] / total * config.scale) for expert in chosen]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("chosen", [1, 3, EXPERTS])
def test_routing(
    score: Literal["softmax", "sigmoid"], normalise: bool, biased: bool, scale: float, chosen: int
) -> None:
    config = MoEConfig(
        experts=EXPERTS,
        experts_per_token=chosen,
        expert_width=4,
        score=score,
        normalise=normalise,
        selection_bias=biased,
        scale=scale,
    )
    generator = torch.Generator().manual_seed(0)
    router = Router(config, WIDTH)
    router.weight.copy_(torch.randn(EXPERTS, WIDTH, generator=generator))
    bias = [0.0] * EXPERTS
    if biased:
        assert router.selection_bias is not None
        bias = torch.linspace(-0.6, 0.6, EXPERTS).tolist()
        router.selection_bias.copy_(torch.tensor(bias))
    x_TD = torch.randn(20, WIDTH, generator=generator)
    routing = router(x_TD)
    assert (routing.gates_TK.dtype, routing.experts_TK.dtype) == (torch.float32, torch.int64)
    for token, logits in enumerate((x_TD.double() @ router.weight.double().T).tolist()):
        wanted = plain_route(logits, bias, config)
        assert routing.experts_TK[token].tolist() == [expert for expert, _ in wanted]
        gates = pytest.approx([gate for _, gate in wanted], rel=1e-4)
        assert routing.gates_TK[token].tolist() == gates


def test_a_bias_chooses_but_does_not_weigh() -> None:
    config = MoEConfig(
        experts=3, experts_per_token=1, expert_width=4, normalise=False, selection_bias=True
    )
    router = Router(config, WIDTH)
    assert router.selection_bias is not None
    router.selection_bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    router.weight.copy_(torch.tensor([2.0, 1.0, 0.0])[:, None] / WIDTH)
    routing = router(torch.ones(1, WIDTH))
    assert routing.experts_TK.tolist() == [[2]]
    wanted = math.exp(0) / (math.exp(2) + math.exp(1) + math.exp(0))
    assert routing.gates_TK.item() == pytest.approx(wanted)


def test_sixteen_bit_activations_are_routed_in_float32() -> None:
    config = MoEConfig(experts=EXPERTS, experts_per_token=2, expert_width=4)
    router = Router(config, WIDTH)
    router.weight.copy_(torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(0)))
    x_TD = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(router(x_TD).gates_TK, router(x_TD.float()).gates_TK)
    assert router(x_TD).gates_TK.dtype == torch.float32


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gates_of_extreme_logits_are_finite(score: Literal["softmax", "sigmoid"]) -> None:
    config = MoEConfig(experts=4, experts_per_token=2, expert_width=4, score=score)
    router = Router(config, 2)
    router.weight.copy_(
        torch.tensor([[-200.0, -190.0, -210.0, -300.0], [500.0, 400.0, 300.0, 0.0]]).T
    )
    assert bool(router(torch.eye(2)).gates_TK.isfinite().all())


@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (60, 4), (128, 8), (6, 4), (5, 5)])
def test_uniform_routing_is_even(experts: int, chosen: int) -> None:
    config = MoEConfig(experts=experts, experts_per_token=chosen, expert_width=4)
    tokens = 4000
    x_TD = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0))

    def of_layer(layer: int) -> UniformRouter:
        router = Router(config, WIDTH)
        # Weights that send every token to the same experts.
        router.weight.copy_(torch.linspace(-1, 1, experts)[:, None].expand(-1, WIDTH))
        return UniformRouter(router, layer)

    layers = [of_layer(layer)(x_TD) for layer in range(3)]
    for routing in layers:
        assert routing.experts_TK.shape == routing.gates_TK.shape == (tokens, chosen)
        assert all(len(set(row)) == chosen for row in routing.experts_TK.tolist())
        torch.testing.assert_close(routing.gates_TK.sum(-1), torch.ones(tokens))
        loads = routing.experts_TK.flatten().bincount(minlength=experts)
        even = tokens * chosen / experts
        assert len(loads) == experts
        assert bool(((loads - even).abs() < 6 * (even * chosen) ** 0.5).all())
    if chosen < experts:
        assert not torch.equal(layers[0].experts_TK, layers[1].experts_TK)
    router = of_layer(0)
    assert torch.equal(router(x_TD[:10]).experts_TK, layers[0].experts_TK[:10])
    if chosen < experts:
        assert not torch.equal(router(x_TD[:10]).experts_TK, layers[0].experts_TK[:10])
