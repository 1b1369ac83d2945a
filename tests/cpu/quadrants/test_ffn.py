"""Both FFN quadrants against a loop over tokens and experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fourfold.quadrants.decode_ffn import decode_ffn
from fourfold.quadrants.experts import ExpertWeights, Routing
from fourfold.quadrants.prefill_ffn import prefill_ffn
from fourfold.quantize.weights import Activations, DenseWeight, to_w8a8
from tests.cpu.quadrants import naive

FFN = Callable[[Activations, Routing, ExpertWeights], Tensor]

both = pytest.mark.parametrize("ffn", [prefill_ffn, decode_ffn])
# tokens, width, ffn width, experts, chosen
SIZES = [
    (1, 16, 8, 4, 2),
    (5, 32, 24, 8, 2),
    (70, 16, 12, 8, 1),
    (9, 64, 48, 4, 4),
    (3, 16, 8, 1, 1),
]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def dense(gate_up: Tensor, down: Tensor, slot_E: Tensor | None = None) -> ExpertWeights:
    parts = DenseWeight(gate_up), DenseWeight(down)
    return ExpertWeights(*parts, slots=len(gate_up), slot_E=slot_E)


def int8(gate_up: Tensor, down: Tensor, slot_E: Tensor | None = None) -> ExpertWeights:
    parts = to_w8a8(gate_up), to_w8a8(down)
    return ExpertWeights(*parts, slots=len(gate_up), slot_E=slot_E)


def check(ffn: FFN, routed: Routing, gate_up: Tensor, down: Tensor, x_TD: Tensor) -> None:
    wanted = naive.routed_ffn(x_TD, routed, gate_up, down)
    out = ffn(Activations(x_TD), routed, dense(gate_up, down))
    assert out.dtype == x_TD.dtype
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    out = ffn(Activations(x_TD), routed, int8(gate_up, down))
    off = (out.double() - wanted).norm() / wanted.norm()
    assert off < 0.05  # two products of 7-bit weights and activations


@both
@sizes
def test_random_routing(ffn: FFN, size: tuple[int, int, int, int, int]) -> None:
    tokens, width, ffn_width, experts, chosen = size
    routed = naive.routing(tokens, experts, chosen)
    check(ffn, routed, *naive.weights(experts, width, ffn_width), naive.tokens(tokens, width))


@both
@pytest.mark.parametrize(
    "experts_TK",
    [
        [[2, 0]],
        [[3, 1]] * 7,
        [[0, 3], [3, 0], [0, 3], [3, 0]],  # two experts of four, in either order
        [[1, 1], [0, 2]],  # the same expert twice
        [[3], [0], [3], [3], [0]],
    ],
    ids=str,
)
def test_given_routing(ffn: FFN, experts_TK: list[list[int]]) -> None:
    """Experts nobody chose first, between and last; all tokens at the same ones."""
    experts = torch.tensor(experts_TK)
    gates = torch.linspace(0.1, 0.8, experts.numel()).view(experts.shape)
    x_TD = naive.tokens(len(experts), 16)
    check(ffn, Routing(gates, experts), *naive.weights(4, 16, 8), x_TD)


@both
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("make", [dense, int8])
def test_experts_that_share_slots(ffn: FFN, make: Callable[..., ExpertWeights], slots: int) -> None:
    """Shared storage answers as copies of it would."""
    slot_E = torch.tensor([2, 0, 0, 1, 2, 1, 0, 0]) % slots
    gate_up, down = naive.weights(slots, 32, 16)
    routed = naive.routing(20, 8, 3)
    x_TD = naive.tokens(20, 32)
    shared = ffn(Activations(x_TD), routed, make(gate_up, down, slot_E))
    copies = ffn(Activations(x_TD), routed, make(gate_up[slot_E], down[slot_E]))
    torch.testing.assert_close(shared, copies, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("width", [64, 200, 576])
def test_int8_bits_do_not_depend_on_the_batch(ffn: FFN, width: int) -> None:
    """A token alone, in a small and in a large batch, in either quadrant: identical float32."""
    routed = naive.routing(150, 8, 2)
    x_TD = naive.tokens(150, width)
    weights = int8(*naive.weights(8, width, 92))
    torch.set_num_threads(2)
    whole = decode_ffn(Activations(x_TD), routed, weights)
    torch.set_num_threads(1)
    for start, end in ((0, 1), (149, 150), (20, 22), (31, 64), (0, 150)):
        part = Routing(routed.gates_TK[start:end], routed.experts_TK[start:end])
        assert torch.equal(ffn(Activations(x_TD[start:end]), part, weights), whole[start:end])


@both
def test_sixteen_bit_activations(ffn: FFN) -> None:
    gate_up, down = naive.weights(4, 32, 16)
    routed = naive.routing(6, 4, 2)
    x_TD = naive.tokens(6, 32).bfloat16()
    out = ffn(Activations(x_TD), routed, dense(gate_up.bfloat16(), down.bfloat16()))
    wanted = naive.routed_ffn(x_TD, routed, gate_up, down)
    assert out.dtype == torch.bfloat16
    assert (out.double() - wanted).norm() / wanted.norm() < 0.02
