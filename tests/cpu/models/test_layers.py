"""Layers over weights in a GPU's precisions, whose kernels have references on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe
from fourfold.models.config import ModelConfig, MoEConfig
from fourfold.models.layers import DenseFFN, Quadrants, SparseFFN
from fourfold.models.rotation import input_turn
from fourfold.quadrants.experts import (
    Delta,
    ExpertWeights,
    GroupedRouting,
    Routing,
    combined,
    swiglu,
)
from fourfold.quadrants.prefill_ffn import prefill_ffn
from fourfold.quadrants.projection import Projected
from fourfold.quantize.w4a8 import quantize_w4a8
from fourfold.quantize.weights import (
    Activations,
    CudaW4A8Weight,
    CudaW8A8Weight,
    Weight,
    turned,
)

WIDTH, HIDDEN = 64, 96


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dense_ffn_codes_its_hidden_rows_as_they_are_made(bits: int) -> None:
    torch.manual_seed(bits)
    ffn = DenseFFN(WIDTH, HIDDEN)
    torch.nn.init.normal_(ffn.gate_up.weight.weight)
    down_DF, turn = torch.randn(WIDTH, HIDDEN), input_turn(HIDDEN)
    assert turn is not None
    if bits == 4:
        packed = quantize_w4a8(turned(down_DF, turn)[None], W4A8Recipe.INT8_G64)
        ffn.down.weight = CudaW4A8Weight(packed, turn)
    else:
        scale_D = down_DF.abs().amax(1) / 127
        codes_DF = (down_DF / scale_D[:, None]).round().to(torch.int8)
        ffn.down.weight = CudaW8A8Weight(torch.nn.functional.pad(codes_DF, (0, 32)), scale_D)
    x = Activations(torch.randn(5, WIDTH))
    out_TD = ffn(x, cast(Quadrants, None))
    wanted_TD = torch.nn.functional.linear(swiglu(ffn.gate_up(x)), down_DF)
    assert out_TD.dtype == torch.float32
    assert (out_TD - wanted_TD).norm() / wanted_TD.norm() < (0.15 if bits == 4 else 0.02)


class Step:
    """One step, in the 4-bit form of the FFN that a GPU has; told how rows were routed."""

    live_T: Tensor | None = None

    def __init__(self) -> None:
        self.routings: list[Routing] = []

    def attention(self, layer: int, projected: Projected, reader: Weight) -> Activations:
        raise AssertionError(layer)

    def experts(self, x: Activations, routing: Routing, weights: ExpertWeights) -> Delta:
        self.routings.append(routing)
        # The references of products know no padding.
        return x.kept if self.live_T is not None else prefill_ffn(x, routing, weights)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_are_sorted_as_they_are_routed_where_experts_are_of_4_bits(shared: bool) -> None:
    torch.manual_seed(0)
    moe = MoEConfig(experts=6, experts_per_token=2, expert_width=HIDDEN)
    ffn = SparseFFN(cast(ModelConfig, SimpleNamespace(width=WIDTH, moe=moe)))
    torch.nn.init.normal_(ffn.router.weight)
    slots = 3 if shared else 6
    shapes = (slots, 2 * HIDDEN, WIDTH), (slots, WIDTH, HIDDEN)
    packed = (quantize_w4a8(torch.randn(shape), W4A8Recipe.INT8_G64) for shape in shapes)
    gate_up, down = (CudaW4A8Weight(weight, None) for weight in packed)
    slot_E = torch.tensor([0, 0, 1, 1, 2, 2]) if shared else None
    ffn.experts = ExpertWeights(gate_up, down, slots=slots, slot_E=slot_E)
    step, x = Step(), Activations(torch.randn(5, WIDTH))
    ours = combined(ffn(x, step))
    assert isinstance(step.routings[0], GroupedRouting) is not shared
    assert torch.equal(ours, combined(prefill_ffn(x, ffn.router(x.kept), ffn.experts)))
    step.live_T = torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32)
    ffn(x, step)
    if isinstance(step.routings[1], GroupedRouting):
        assert int(step.routings[1].groups.ends_E[-1]) == 3 * 2
