"""Heads normed and rotated: the reference against its definition, the kernel against both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels.rope import (
    OpenRows,
    norm_rope,
    norm_rope_append,
    reference,
    rope_angles,
    triton_rope,
)
from fourfold.kernels.rope.choose import Tile, choose_tile
from fourfold.kernels.rope.triton_angles import launch_angles
from fourfold.kernels.rope.triton_rope import launch

HEADS, KV_HEADS, WIDTH, TOKENS = 6, 2, 16, 5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def inputs(dtype: torch.dtype = torch.float32, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    """A projection, and the cosines and sines of positions as `Rope` has them."""
    qkv_TA = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * width).to(dtype)
    angle = torch.rand(TOKENS, width // 2) * 6
    cos_TC = torch.cat((angle.cos(), angle.cos()), -1)
    return qkv_TA, cos_TC, torch.cat((-angle.sin(), angle.sin()), -1)


@pytest.mark.parametrize("width", [WIDTH, 20])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_normed_and_their_halves_turned_against_each_other(
    normed: bool, width: int
) -> None:
    qkv_TA, cos_TC, sin_TC = inputs(width=width)
    weights = [torch.rand(width) + 0.5 if normed else None for _ in range(2)]
    q, k, v = qkv_TA.unflatten(-1, (-1, width)).split([HEADS, KV_HEADS, KV_HEADS], 1)
    if normed:
        q, k = (F.rms_norm(x, (width,), w, 1e-5) for x, w in zip((q, k), weights, strict=True))

    def rotated(x_THC: Tensor) -> Tensor:
        a, b = x_THC.chunk(2, -1)
        c, s = cos_TC[:, None, : width // 2], sin_TC[:, None, width // 2 :]
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    ours = norm_rope(qkv_TA, HEADS, KV_HEADS, width, cos_TC, sin_TC, *weights, 1e-5)
    for out, expected in zip(ours, (rotated(q), rotated(k), v), strict=True):
        torch.testing.assert_close(out, expected)


def test_the_offset_is_taken_from_the_rotated_keys_alone() -> None:
    qkv_TA, cos_TC, sin_TC = inputs()
    offset_GC = torch.randn(KV_HEADS, WIDTH)
    q, k, v = norm_rope(qkv_TA, HEADS, KV_HEADS, WIDTH, cos_TC, sin_TC)
    moved = norm_rope(qkv_TA, HEADS, KV_HEADS, WIDTH, cos_TC, sin_TC, k_offset_GC=offset_GC)
    for out, expected in zip(moved, (q, k - offset_GC, v), strict=True):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(0, 16), (1, 128), (37, 48)])
def test_angles_of_positions(
    tokens: int, width: int, dtype: torch.dtype, index: torch.dtype
) -> None:
    positions_T = torch.randint(100_000, (tokens,)).to(index)
    frequencies = 1e4 ** -(torch.arange(0, width, 2) / width)
    angle_TC = (positions_T[:, None].float() * frequencies).double().repeat(1, 2)
    sign_C = torch.tensor([-1.0, 1.0]).repeat_interleave(width // 2)
    for cos_TC, sin_TC in (
        rope_angles(positions_T, frequencies, dtype),
        launch_angles(positions_T, frequencies, dtype),
    ):
        for out, exact in ((cos_TC, angle_TC.cos()), (sin_TC, angle_TC.sin() * sign_C)):
            assert out.dtype == dtype
            tolerance = 1e-6 if dtype == torch.float32 else 1e-3
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("q_norm", [False, True])
@pytest.mark.parametrize("k_norm", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_is_the_reference(
    q_norm: bool, k_norm: bool, offset: bool, dtype: torch.dtype
) -> None:
    qkv_TA, cos_TC, sin_TC = inputs(dtype)
    arguments = (
        qkv_TA,
        HEADS,
        KV_HEADS,
        WIDTH,
        cos_TC,
        sin_TC,
        torch.rand(WIDTH) + 0.5 if q_norm else None,
        torch.rand(WIDTH) + 0.5 if k_norm else None,
        1e-6,
        torch.randn(KV_HEADS, WIDTH) if offset else None,
    )
    q, k, v = launch(*arguments)
    for out, expected in zip((q, k, v), reference.norm_rope(*arguments), strict=True):
        torch.testing.assert_close(out, expected)
        assert out.dtype == dtype
    assert q.is_contiguous()
    assert k is not None
    assert k.is_contiguous()


def test_values_are_not_copied() -> None:
    qkv_TA, cos_TC, sin_TC = inputs()
    v_TGC = launch(qkv_TA, HEADS, KV_HEADS, WIDTH, cos_TC, sin_TC, None, None, 1e-6, None)[2]
    assert v_TGC is not None
    assert v_TGC._base is qkv_TA


def test_a_projection_may_be_part_of_a_wider_one() -> None:
    qkv_TA, cos_TC, sin_TC = inputs(torch.bfloat16)
    wider = torch.cat((qkv_TA, qkv_TA), 1)[:, : qkv_TA.shape[1]]
    arguments = (HEADS, KV_HEADS, WIDTH, cos_TC.bfloat16(), sin_TC.bfloat16())
    for out, expected in zip(
        launch(wider, *arguments, None, None, 1e-6, None),
        reference.norm_rope(qkv_TA, *arguments),
        strict=True,
    ):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("tile", [Tile(1, 4, 1), Tile(2, 4, 1), Tile(5, 2, 4)])
def test_it_does_not_matter_how_heads_are_dealt(
    tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv_TA, cos_TC, sin_TC = inputs()
    weight_C = torch.rand(WIDTH) + 0.5
    arguments = (
        qkv_TA, HEADS, KV_HEADS, WIDTH, cos_TC, sin_TC, weight_C, weight_C, 1e-6,
        torch.randn(KV_HEADS, WIDTH),
    )  # fmt: skip
    expected = launch(*arguments)
    monkeypatch.setattr(triton_rope, "choose_tile", lambda *shape, values: tile)
    for out, same in zip(launch(*arguments), expected, strict=True):
        assert torch.equal(out, same)


@pytest.mark.parametrize("tokens", [1, 64, 4096, 100_000])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (32, 4), (64, 8)])
def test_no_block_is_left_without_heads(
    tokens: int, values: bool, heads: int, kv_heads: int
) -> None:
    tile = choose_tile(tokens, heads, kv_heads, values=values)
    assert 1 <= tile.blocks <= -(-heads // tile.heads) + (1 + values) * -(-kv_heads // tile.heads)
    assert tile.heads & (tile.heads - 1) == 0


def test_no_tokens() -> None:
    qkv_TA, cos_TC, sin_TC = (x[:0] for x in inputs())
    q, k, v = launch(qkv_TA, HEADS, KV_HEADS, WIDTH, cos_TC, sin_TC, None, None, 1e-6, None)
    assert q.shape == (0, HEADS, WIDTH)
    assert k.shape == v.shape == (0, KV_HEADS, WIDTH)


def opened_rows(dtype: torch.dtype) -> OpenRows:
    """Three slots of 64 rows, poisoned; the second and the last token go nowhere."""
    rows = [torch.full((192, KV_HEADS, WIDTH), float("nan")).to(dtype) for _ in range(2)]
    return OpenRows(*rows, torch.tensor([130, -1, 3, 191, -1], dtype=torch.int32))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [None, Tile(1, 4, 1), Tile(3, 2, 4)])
def test_keys_and_values_go_to_their_open_pages(
    keep: bool, dtype: torch.dtype, tile: Tile | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile is not None:
        monkeypatch.setattr(triton_rope, "choose_tile", lambda *shape, values: tile)
    qkv_TA, cos_TC, sin_TC = inputs(dtype)
    arguments = (qkv_TA, HEADS, KV_HEADS, WIDTH, cos_TC, sin_TC)
    options = (torch.rand(WIDTH), torch.rand(WIDTH), 1e-6, torch.randn(KV_HEADS, WIDTH))
    ours, theirs = opened_rows(dtype), opened_rows(dtype)
    q, k, v = launch(*arguments, *options, ours, keep=keep)
    wanted = norm_rope_append(*arguments, theirs, *options, keep=True)
    torch.testing.assert_close(q, wanted[0])
    assert (k is not None) is (v is not None) is keep
    for rows, expected in zip((k, v), wanted[1:], strict=True):
        if keep:
            torch.testing.assert_close(rows, expected)
    for kept, expected in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(kept, expected, equal_nan=True)
        assert kept.isnan().all((1, 2)).sum() == 192 - 3
