"""Layers over weights in a GPU's precisions, whose kernels have references on a CPU."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe
from fourfold.models.layers import DenseFFN, Quadrants
from fourfold.models.rotation import input_turn
from fourfold.quadrants.experts import swiglu
from fourfold.quantize.w4a8 import quantize_w4a8
from fourfold.quantize.weights import Activations, CudaW4A8Weight, CudaW8A8Weight, turned

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
