"""Rows in 8 bits: the reference against float64, the Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold.kernels.routing.triton_routing import launch_combine
from fourfold.kernels.rows import Rows, quantize_rows, reference, rms_norm_quantize
from fourfold.kernels.rows.choose import choose_tile
from fourfold.kernels.rows.quantize import WIDEST
from fourfold.kernels.rows.triton_rows import launch_norm, launch_quantize
from fourfold.models.rotation import input_turn
from tests.cpu.kernels.codes import same_codes

DTYPES = [torch.int8, torch.float8_e4m3fn]
TURN = input_turn(32)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rows_with_outliers(tokens: int, channels: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_TK = torch.randn(tokens, channels, generator=generator)
    x_TK[:, channels // 3] *= 40
    x_TK[tokens // 2] = 0
    return x_TK.to(dtype)


def same(ours: Rows, theirs: Rows) -> bool:
    codes = same_codes(ours.codes_TW, theirs.codes_TW)
    return codes and torch.equal(ours.scale_T, theirs.scale_T)


def dequantized(rows: Rows, channels: int) -> Tensor:
    return rows.codes_TW.double()[:, :channels] * rows.scale_T.double()[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_code_is_the_nearest_multiple_of_the_rows_scale(dtype: torch.dtype) -> None:
    x_TK = rows_with_outliers(6, 100, torch.float32)
    rows = quantize_rows(x_TK, dtype, 128)
    assert rows.codes_TW.dtype == dtype
    assert rows.scale_T.dtype == torch.float32
    largest = 127 if dtype == torch.int8 else 448
    expected_T = x_TK.double().abs().amax(-1) / largest
    torch.testing.assert_close(rows.scale_T.double(), expected_T, rtol=1e-6, atol=1e-30)
    off = (dequantized(rows, 100) - x_TK.double()).abs()
    # Half a step of int8; of e4m3 half a unit in the last of 3 bits, or half its smallest number.
    step = rows.scale_T.double()[:, None] * (1 if dtype == torch.int8 else 2**-9)
    relative = 0 if dtype == torch.int8 else x_TK.double().abs() / 16
    assert bool((off <= torch.clamp(step * 0.5001, min=0) + relative).all())
    assert int(rows.codes_TW[:, 100:].float().abs().max()) == 0
    assert rows.codes_TW.float().abs().amax(-1).tolist() == [largest] * 3 + [0] + [largest] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "channels", "width"), [(1, 64, 64), (5, 100, 128), (3, 1, 16)])
def test_the_kernels_codes_are_the_references_bits(
    dtype: torch.dtype, kept: torch.dtype, tokens: int, channels: int, width: int
) -> None:
    x_TK = rows_with_outliers(tokens, channels, kept)
    assert same(
        launch_quantize(x_TK, dtype, width, None), reference.quantize_rows(x_TK, dtype, width)
    )


def test_rows_may_be_part_of_wider_ones() -> None:
    x_TK = rows_with_outliers(4, 96, torch.bfloat16)[:, 32:]
    assert same(
        launch_quantize(x_TK, torch.int8, 64, None), reference.quantize_rows(x_TK, torch.int8, 64)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_turned_rows_keep_their_norm_and_lose_their_outliers(dtype: torch.dtype) -> None:
    x_TK = rows_with_outliers(5, 96, torch.float16)  # the interpreter cannot multiply bfloat16
    rows = quantize_rows(x_TK, dtype, 128, turn_bb=TURN)
    assert TURN is not None
    turned = (x_TK.double().view(-1, 32) @ TURN.double()).view(5, 96)
    error = (dequantized(rows, 96) - turned).norm() / turned.norm()
    assert error < (0.01 if dtype == torch.int8 else 0.04)
    assert float(rows.scale_T[0]) < float(quantize_rows(x_TK, dtype, 128).scale_T[0])
    from_kernel = launch_quantize(x_TK, dtype, 128, TURN)
    torch.testing.assert_close(from_kernel.scale_T, rows.scale_T, rtol=1e-5, atol=0)
    off = (dequantized(from_kernel, 96) - dequantized(rows, 96)).norm() / turned.norm()
    assert off < (1e-3 if dtype == torch.int8 else 0.2)  # see `same_codes`


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_rows_of_gates_and_ups(turned: bool, kept: torch.dtype) -> None:
    gate_up_T2K = torch.cat((rows_with_outliers(5, 96, kept), torch.randn(5, 96).to(kept)), 1)
    gate_up_T2K[3, :96] = -200  # whose exponential overflows
    turn_bb = TURN if turned else None
    gate_TK, up_TK = gate_up_T2K.double().chunk(2, 1)
    exact_TK = torch.nn.functional.silu(gate_TK) * up_TK
    if turn_bb is not None:
        exact_TK = (exact_TK.view(-1, 32) @ turn_bb.double()).view(5, 96)
    plain = quantize_rows(gate_up_T2K, torch.int8, 128, turn_bb=turn_bb, swiglu=True)
    ours = launch_quantize(gate_up_T2K, torch.int8, 128, turn_bb, swiglu=True)
    for rows in (plain, ours):
        assert rows.codes_TW.shape == (5, 128)
        error = (dequantized(rows, 96) - exact_TK).norm() / exact_TK.norm()
        assert error < (0.01 if turned else 0.02)
        assert int(rows.codes_TW[:, 96:].abs().max()) == 0
    torch.testing.assert_close(ours.scale_T, plain.scale_T, rtol=1e-3, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("keep_normed", [False, True])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_a_norm_and_its_codes(
    dtype: torch.dtype, residual: bool, keep_normed: bool, kept: torch.dtype
) -> None:
    x_TD = rows_with_outliers(5, 72, kept)
    residual_TD = rows_with_outliers(5, 72, kept, seed=1) if residual else None
    weight_D = torch.rand(72) + 0.5
    ours = launch_norm(x_TD, weight_D, 1e-6, dtype, 128, residual_TD, keep_normed)
    plain = rms_norm_quantize(
        x_TD, weight_D, 1e-6, dtype, 128, residual_TD=residual_TD, keep_normed=keep_normed
    )
    summed_TD = x_TD if residual_TD is None else x_TD + residual_TD
    exact_TD = torch.nn.functional.rms_norm(summed_TD.double(), (72,), weight_D.double(), 1e-6)
    for out in (ours, plain):
        # The interpreter cuts off where it should round to 16 bits.
        torch.testing.assert_close(out.residual_TD, summed_TD, rtol=2**-7, atol=0)
        error = (dequantized(out.rows, 72) - exact_TD).norm() / exact_TD.norm()
        assert error < (0.03 if dtype == torch.int8 else 0.2)  # see `same_codes`
        assert int(out.rows.codes_TW[:, 72:].float().abs().max()) == 0
        assert (out.normed_TD is not None) == keep_normed
        if out.normed_TD is not None:
            assert out.normed_TD.dtype == kept
            torch.testing.assert_close(out.normed_TD.double(), exact_TD, rtol=2e-2, atol=1e-2)
    if kept == torch.float32:
        torch.testing.assert_close(ours.rows.scale_T, plain.rows.scale_T, rtol=1e-5, atol=0)
        # Sums are added up in another order, so a code may be the neighbour.
        differing = ours.rows.codes_TW.float() != plain.rows.codes_TW.float()
        assert differing.float().mean() < (0.02 if dtype == torch.int8 else 0.1)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_norm_of_what_experts_returned(residual: bool, padded: bool) -> None:
    out_TKD, gates_TK = torch.randn(5, 3, 96), torch.rand(5, 3)
    residual_TD = torch.randn(5, 96) if residual else None
    live_T = torch.tensor([1, 1, 0, 1, 0], dtype=torch.int32) if padded else None
    if padded:
        out_TKD[2], gates_TK[4] = float("nan"), float("nan")
        gates_TK[2] = 0
    weight_D = torch.rand(96)
    ours = launch_norm(
        out_TKD, weight_D, 1e-6, torch.int8, 128, residual_TD, True, gates_TK, live_T
    )
    summed_TD = launch_combine(out_TKD, gates_TK, torch.float32, live_T)
    plain = launch_norm(summed_TD, weight_D, 1e-6, torch.int8, 128, residual_TD, True)
    assert torch.equal(ours.residual_TD, plain.residual_TD)
    assert ours.normed_TD is not None
    assert plain.normed_TD is not None
    assert torch.equal(ours.normed_TD, plain.normed_TD)
    assert same(ours.rows, plain.rows)
    wanted = rms_norm_quantize(
        out_TKD,
        weight_D,
        1e-6,
        torch.int8,
        128,
        residual_TD=residual_TD,
        gates_TK=gates_TK,
        live_T=live_T,
    )
    torch.testing.assert_close(ours.residual_TD, wanted.residual_TD)


def test_what_a_kernel_would_misread_is_refused() -> None:
    x_TD = torch.randn(2, 64)
    assert TURN is not None
    for turn in (TURN.double(), TURN.T):
        with pytest.raises(AssertionError, match="a turn"):
            quantize_rows(x_TD, torch.int8, 64, turn_bb=turn)
    with pytest.raises(AssertionError, match="only what is combined"):
        rms_norm_quantize(x_TD, torch.ones(64), 1e-6, torch.int8, 64, live_T=torch.ones(2).int())
    with pytest.raises(AssertionError, match="contiguous"):
        rms_norm_quantize(x_TD, torch.ones(128)[::2], 1e-6, torch.int8, 64)


def test_no_rows() -> None:
    empty = torch.empty(0, 64)
    assert launch_quantize(empty, torch.int8, 64, None).codes_TW.shape == (0, 64)
    norm = launch_norm(empty, torch.ones(64), 1e-6, torch.int8, 64, None, True)
    assert norm.rows.scale_T.shape == (0,)


@settings(derandomize=True, deadline=None)
@given(
    rows=st.integers(1, 1 << 17),
    width=st.integers(1, WIDEST),
    turned=st.booleans(),
    swiglu=st.booleans(),
)
def test_every_tile_holds_a_row_and_fits_a_block(
    rows: int, width: int, turned: bool, swiglu: bool
) -> None:
    tile = choose_tile(rows, width, turned=turned, swiglu=swiglu)
    assert tile.rows * tile.channels <= 32 * tile.warps * (32 if swiglu else 64)
    assert width <= tile.channels < 2 * max(width, 32)
    assert tile.channels & (tile.channels - 1) == 0
    assert tile.rows == 1 or tile.rows * tile.channels <= (8192 if turned else 4096)
    assert tile.rows == 1 or rows // tile.rows >= 1024
