"""Rows in 8 bits on a GPU: the reference's bits, whatever was in the memory before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.rows import NormedRows, Rows, quantize_rows, reference, rms_norm_quantize
from fourfold.models.rotation import input_turn

DTYPES = [torch.int8, torch.float8_e4m3fn]
SHAPES = [(1, 64, 64), (7, 100, 128), (33, 768, 768), (9000, 768, 768), (5, 5120, 5120)]
SETTINGS = [(torch.bfloat16, *shape) for shape in SHAPES] + [
    (torch.float16, 33, 768, 768),
    (torch.float32, 33, 768, 768),
    (torch.float32, 1, 64, 64),
]


def rows_with_outliers(tokens: int, channels: int, dtype: torch.dtype) -> Tensor:
    x_TK = torch.randn(tokens, channels, device="cuda")
    x_TK[:, channels // 3] *= 40
    if tokens > 1:
        x_TK[tokens // 2] = 0
    return x_TK.to(dtype)


def poison(megabytes: int = 64) -> None:
    """Leaves 0x7f (NaN in float8) in the memory that the next tensors are made of."""
    torch.full((megabytes << 20,), 0x7F, dtype=torch.uint8, device="cuda")
    for power in range(9, 24):
        torch.full((1 << power,), 0x7F, dtype=torch.uint8, device="cuda")


def same(ours: Rows, theirs: Rows) -> bool:
    codes = torch.equal(ours.codes_TW.view(torch.uint8), theirs.codes_TW.view(torch.uint8))
    return codes and torch.equal(ours.scale_T, theirs.scale_T)


def values(rows: Rows) -> Tensor:
    return rows.codes_TW.float() * rows.scale_T[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "tokens", "channels", "width"), SETTINGS)
def test_codes_are_the_references_bits(
    dtype: torch.dtype, kept: torch.dtype, tokens: int, channels: int, width: int
) -> None:
    x_TK = rows_with_outliers(tokens, channels, kept)
    poison()
    ours = quantize_rows(x_TK, dtype, width)
    assert same(ours, reference.quantize_rows(x_TK, dtype, width))
    assert same(ours, quantize_rows(x_TK, dtype, width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kept", "tokens", "channels"),
    [
        (torch.bfloat16, 1, 64),
        (torch.bfloat16, 9000, 768),
        (torch.float16, 33, 768),
        (torch.float32, 33, 768),
    ],
)
def test_turned_rows(dtype: torch.dtype, kept: torch.dtype, tokens: int, channels: int) -> None:
    turn = input_turn(channels)
    assert turn is not None
    turn = turn.cuda()
    x_TK = rows_with_outliers(tokens, channels, kept)
    poison()
    ours = quantize_rows(x_TK, dtype, channels, turn_bb=turn)
    turned = (x_TK.double().view(-1, 32) @ turn.double()).view(x_TK.shape).float()
    exact = reference.quantize_rows(turned, dtype, channels)
    torch.testing.assert_close(ours.scale_T, exact.scale_T, rtol=2e-3, atol=1e-30)
    error, allowed = ((values(out) - turned).norm() / turned.norm() for out in (ours, exact))
    assert error < 1.02 * allowed
    assert same(ours, quantize_rows(x_TK, dtype, channels, turn_bb=turn))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kept", "tokens", "channels"),
    [
        (torch.bfloat16, 1, 64),
        (torch.bfloat16, 9000, 768),
        (torch.bfloat16, 33, 14336),
        (torch.float16, 33, 768),
        (torch.float32, 33, 768),
    ],
)
def test_rows_of_gates_and_ups(
    dtype: torch.dtype, kept: torch.dtype, tokens: int, channels: int
) -> None:
    turn = input_turn(channels)
    assert turn is not None
    turn = turn.cuda()
    gate_up = torch.cat([rows_with_outliers(tokens, channels, kept) for _ in range(2)], 1)
    gate, up = gate_up.double().chunk(2, 1)
    hidden = (torch.nn.functional.silu(gate) * up).to(kept).double()
    poison()
    ours = quantize_rows(gate_up, dtype, channels, turn_bb=turn, swiglu=True)
    turned = (hidden.view(-1, 32) @ turn.double()).view(hidden.shape).float()
    exact = reference.quantize_rows(turned, dtype, channels)
    torch.testing.assert_close(ours.scale_T, exact.scale_T, rtol=6e-3, atol=1e-30)
    error, allowed = ((values(out) - turned).norm() / turned.norm() for out in (ours, exact))
    assert error < 1.05 * allowed
    assert same(ours, quantize_rows(gate_up, dtype, channels, turn_bb=turn, swiglu=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 64), (33, 768), (1000, 2048), (3, 5120)])
def test_a_norm_and_its_codes(
    dtype: torch.dtype, residual: bool, tokens: int, channels: int
) -> None:
    x_TD = rows_with_outliers(tokens, channels, torch.bfloat16)
    residual_TD = rows_with_outliers(tokens, channels, torch.bfloat16) if residual else None
    weight_D = torch.rand(channels, device="cuda") + 0.5

    def run() -> NormedRows:
        poison()
        return rms_norm_quantize(
            x_TD,
            weight_D,
            1e-6,
            dtype,
            channels + 64,
            residual_TD=residual_TD,
            keep_normed=True,
        )

    ours = run()
    plain = reference.rms_norm_quantize(
        x_TD,
        weight_D,
        1e-6,
        dtype,
        channels + 64,
        residual_TD=residual_TD,
        keep_normed=True,
    )
    assert torch.equal(ours.residual_TD, plain.residual_TD)
    assert ours.normed_TD is not None
    assert plain.normed_TD is not None
    torch.testing.assert_close(ours.normed_TD, plain.normed_TD, rtol=2**-7, atol=0)
    torch.testing.assert_close(ours.rows.scale_T, plain.rows.scale_T, rtol=1e-5, atol=0)
    difference = (values(ours.rows) - values(plain.rows)).norm() / values(plain.rows).norm()
    assert difference < (0.005 if dtype == torch.int8 else 0.015)
    assert not ours.rows.codes_TW[:, channels:].float().any()
    again = run()
    assert same(ours.rows, again.rows)
    assert again.normed_TD is not None
    assert torch.equal(ours.normed_TD, again.normed_TD)


def test_the_kernels_can_be_replayed() -> None:
    x_TD = rows_with_outliers(64, 256, torch.bfloat16)
    weight_D = torch.ones(256, device="cuda")

    def run() -> tuple[Rows, NormedRows]:
        return quantize_rows(x_TD, torch.int8, 256), rms_norm_quantize(
            x_TD, weight_D, 1e-6, torch.int8, 256, residual_TD=x_TD
        )

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, normed = run()
    x_TD.copy_(rows_with_outliers(64, 256, torch.bfloat16))
    graph.replay()
    expected_rows, expected_normed = run()
    assert same(rows, expected_rows)
    assert same(normed.rows, expected_normed.rows)
