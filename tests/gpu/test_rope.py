"""Heads normed and rotated on a GPU, against the reference."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels.rope import (
    OpenRows,
    norm_rope,
    norm_rope_append,
    reference,
    rope_angles,
)

SHAPES = [(1, 9, 3, 64), (37, 32, 4, 128), (2000, 8, 8, 64)]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "width"), SHAPES)
def test_the_kernel_is_the_reference(
    normed: bool,
    offset: bool,
    dtype: torch.dtype,
    tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
) -> None:
    qkv_TA = torch.randn(tokens, (heads + 2 * kv_heads) * width, device="cuda")
    qkv_TA[:, 5] *= 40
    angle = torch.rand(tokens, width // 2, device="cuda") * 6
    cos_TC = torch.cat((angle.cos(), angle.cos()), -1)
    sin_TC = torch.cat((-angle.sin(), angle.sin()), -1)
    weights = [torch.rand(width, device="cuda") + 0.5 if normed else None for _ in range(2)]
    offset_GC = torch.randn(kv_heads, width, device="cuda") if offset else None
    arguments = (
        qkv_TA.to(dtype), heads, kv_heads, width, cos_TC, sin_TC, *weights, 1e-6, offset_GC
    )  # fmt: skip
    torch.full((64 << 20,), 0x7F, dtype=torch.uint8, device="cuda")
    ours, again, plain = (
        norm_rope(*arguments),
        norm_rope(*arguments),
        reference.norm_rope(*arguments),
    )
    assert ours[0].is_contiguous()
    assert ours[1].is_contiguous()
    for out, second, expected in zip(ours, again, plain, strict=True):
        assert torch.equal(out, second)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance / 4)
    assert torch.equal(ours[2], plain[2])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "width"), SHAPES)
def test_keys_and_values_go_to_their_open_pages(
    keep: bool, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, width: int
) -> None:
    """The same bits as `norm_rope` gives at the places that were named, and nothing beside them."""
    qkv_TA = torch.randn(tokens, (heads + 2 * kv_heads) * width, device="cuda").to(dtype)
    angles = torch.randn(2, tokens, width, device="cuda")
    weights = (torch.rand(width, device="cuda"), torch.rand(width, device="cuda"))
    options = (*weights, 1e-6, torch.randn(kv_heads, width, device="cuda"))
    place_T = torch.randperm(tokens + 64, device="cuda")[:tokens].int()
    place_T[1::5] = -1
    rows = torch.full((4, tokens + 64, kv_heads, width), float("nan"), device="cuda", dtype=dtype)
    arguments = (qkv_TA, heads, kv_heads, width, *angles)
    kept = OpenRows(rows[0], rows[1], place_T)
    q, k, v = norm_rope_append(*arguments, kept, *options, keep=keep)  # type: ignore[call-arg, misc]
    expected = norm_rope(*arguments, *options)  # type: ignore[call-arg]
    assert torch.equal(q, expected[0])
    wanted = place_T >= 0
    for kept, part in zip(rows[2:], expected[1:], strict=True):
        kept[place_T[wanted].long()] = part[wanted]
    assert torch.equal(rows[:2].view(torch.int16), rows[2:].view(torch.int16))
    assert (k is not None) is (v is not None) is keep
    if k is not None and v is not None:
        assert torch.equal(k, expected[1])
        assert torch.equal(v, expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (1000, 64), (16384, 128)])
def test_angles_of_positions(tokens: int, width: int, dtype: torch.dtype) -> None:
    positions_T = torch.randint(100_000, (tokens,), dtype=torch.int32, device="cuda")
    frequencies = 1e4 ** -(torch.arange(0, width, 2, device="cuda") / width)
    ours = rope_angles(positions_T, frequencies, dtype)
    exact = reference.rope_angles(positions_T, frequencies, torch.float32)
    for out, expected in zip(ours, exact, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)
