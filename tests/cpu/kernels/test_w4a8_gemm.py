"""Packing, the reference and the Triton form (in the interpreter) of the W4A8 products."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from fourfold.kernels.routing import group_rows
from fourfold.kernels.w4a8_gemm import grouped_w4a8_gemm, reference, w4a8_gemm, w8a8_gemm
from fourfold.kernels.w4a8_gemm.choose import (
    Kernel,
    Tiles,
    choose_at_once,
    choose_dense,
    choose_grouped,
    dense_tile,
    hopper_stages,
)
from fourfold.kernels.w4a8_gemm.packing import (
    PackedW4A8,
    W4A8Recipe,
    dequantize,
    pack_nibbles,
    padded,
    unpack_nibbles,
)
from fourfold.quantize.w4a8 import quantize_w4a8

pytest.importorskip("triton")

RECIPES = list(W4A8Recipe)
SMALL = Tiles(half=16, tokens=16, stages=2, warps=4, programs=1)


def quantized_rows(x_TI: torch.Tensor, recipe: W4A8Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, padded I] and scales [T]."""
    largest = 127.0 if recipe.activations == torch.int8 else 448.0
    scale_T = x_TI.abs().amax(-1).clamp_min(1e-30) / largest
    scaled = x_TI / scale_T[:, None]
    if recipe.activations == torch.int8:
        scaled = scaled.round()
    scaled = torch.nn.functional.pad(scaled, (0, padded(x_TI.shape[1]) - x_TI.shape[1]))
    return scaled.to(recipe.activations), scale_T


def random_weight(experts: int, outputs: int, inputs: int, recipe: W4A8Recipe) -> PackedW4A8:
    weight = torch.randn(experts, outputs, inputs)
    weight[:, ::5, ::7] *= 6
    return quantize_w4a8(weight, recipe)


def assert_equal(out: torch.Tensor, wanted: torch.Tensor, recipe: W4A8Recipe) -> None:
    if recipe.activations == torch.int8:
        assert torch.equal(out, wanted)
    else:
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_nibbles_come_back(recipe: W4A8Recipe) -> None:
    nibbles = torch.randint(16, (2, 16, 200), dtype=torch.uint8)
    packed = pack_nibbles(nibbles, recipe)
    assert packed.shape == (2, 2, 16, 64)
    assert torch.equal(unpack_nibbles(packed, recipe)[..., :200], nibbles)


@pytest.mark.parametrize("recipe", RECIPES)
def test_reference_is_the_product_of_what_codes_stand_for(recipe: W4A8Recipe) -> None:
    torch.manual_seed(0)
    weight = random_weight(1, 32, 200, recipe)
    codes_TK, scale_T = quantized_rows(torch.randn(5, 200), recipe)
    x_TI = (codes_TK.double() * scale_T.double()[:, None])[:, :200]
    out = reference.w4a8_gemm(codes_TK, scale_T, weight, out_dtype=torch.float32)
    torch.testing.assert_close(
        out.double(), x_TI @ dequantize(weight)[0].double().T, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("tokens", "split"), [(1, 1), (19, 1), (3, 2)])
def test_dense_product(recipe: W4A8Recipe, tokens: int, split: int) -> None:
    torch.manual_seed(1)
    tiles = dataclasses.replace(SMALL, split=split)
    weight = random_weight(1, 48, 200, recipe)
    codes_TK, scale_T = quantized_rows(torch.randn(tokens, 200) * 3, recipe)
    out = w4a8_gemm(codes_TK, scale_T, weight, out_dtype=torch.float32, tiles=tiles)
    wanted = reference.w4a8_gemm(codes_TK, scale_T, weight, out_dtype=torch.float32)
    assert_equal(out, wanted, recipe)


@pytest.mark.parametrize("split", [1, 2])
def test_product_of_8_bit_weights(split: int) -> None:
    torch.manual_seed(2)
    weight_OK = torch.randint(-127, 128, (48, 256), dtype=torch.int8)
    codes_TK, scale_T = quantized_rows(torch.randn(5, 256), W4A8Recipe.INT8_CHANNEL)
    inputs = (codes_TK, scale_T, weight_OK, torch.rand(48))
    tiles = dataclasses.replace(SMALL, split=split)
    out = w8a8_gemm(*inputs, out_dtype=torch.float32, tiles=tiles)
    assert torch.equal(out, reference.w8a8_gemm(*inputs, out_dtype=torch.float32))


def test_channels_come_in_whole_blocks() -> None:
    codes_TK, scale_T = quantized_rows(torch.randn(5, 256), W4A8Recipe.INT8_CHANNEL)
    weight_OK, scale_O = torch.ones(48, 256, dtype=torch.int8), torch.ones(48)
    some = (codes_TK[:, :200].contiguous(), scale_T, weight_OK[:, :200].contiguous(), scale_O)
    with pytest.raises(AssertionError, match="200 channels are not whole blocks"):
        w8a8_gemm(*some, out_dtype=torch.float32)
    tiles = dataclasses.replace(SMALL, split=4)
    with pytest.raises(AssertionError, match="split=4"):
        w8a8_gemm(codes_TK, scale_T, weight_OK, scale_O, out_dtype=torch.float32, tiles=tiles)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("routing", ["random", "one expert", "one token", "padding"])
def test_experts_ffn(recipe: W4A8Recipe, routing: str) -> None:
    torch.manual_seed(3)
    experts, choices, width, hidden = 5, 2, 144, 48
    experts_TK = torch.randint(experts - 1, (13, choices))
    if routing == "one expert":
        experts_TK[:] = 2
    elif routing == "one token":
        experts_TK = experts_TK[:1].contiguous()
    live_T = (torch.arange(13) % 3 == 0).int() if routing == "padding" else None
    groups = group_rows(experts_TK, experts, tile=16, live_T=live_T)
    rows = int(groups.ends_E[-1])
    gate_up = random_weight(experts, 2 * hidden, width, recipe)
    down = random_weight(experts, width, hidden, recipe)
    codes, scale = quantized_rows(torch.randn(experts_TK.shape[0], width), recipe)

    def first(verbs: object, **options: object) -> torch.Tensor:
        return verbs.grouped_w4a8_gemm(  # type: ignore[attr-defined]
            codes,
            scale,
            gate_up,
            groups,
            gather=choices,
            scatter=False,
            swiglu=True,
            out_dtype=torch.float32,
            **options,
        )

    wanted_RF = first(reference)
    assert wanted_RF.shape == (experts_TK.numel(), hidden)
    atol = 1e-3 * float(wanted_RF.abs().max())
    ours_RF = first(_kernels, tiles=SMALL)
    torch.testing.assert_close(ours_RF[:rows], wanted_RF[:rows], rtol=2e-3, atol=atol)
    codes_RK, scale_R = quantized_rows(wanted_RF, recipe)

    def second(verbs: object, **options: object) -> torch.Tensor:
        return verbs.grouped_w4a8_gemm(  # type: ignore[attr-defined]
            codes_RK,
            scale_R,
            down,
            groups,
            gather=None,
            scatter=True,
            swiglu=False,
            out_dtype=torch.float32,
            **options,
        )

    order_R = groups.order_R[:rows].long()
    ours_RO, wanted_RO = second(_kernels, tiles=SMALL), second(reference)
    assert_equal(ours_RO[order_R], wanted_RO[order_R], recipe)


class _kernels:  # noqa: N801
    grouped_w4a8_gemm = staticmethod(grouped_w4a8_gemm)


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("blocks", [5, 6])
def test_blocks_in_flight_fit_into_shared_memory(tokens: int, itemsize: int, blocks: int) -> None:
    tiles = choose_grouped(tokens, 1000, blocks, second=True, groups=True, hopper=True)
    stages = hopper_stages(tiles, itemsize)
    assert stages >= 4
    runs = tiles.half // 32
    sums = 512 * tokens if tiles.split > 1 else 0
    used = stages * (runs * 4352 + 128 * tokens) + 128 * tokens * itemsize + sums
    assert tiles.programs * used <= 227 << 10


def test_a_gpu_before_hopper_gets_the_triton_form() -> None:
    for tokens in (16, 32, 64, 128):
        tiles = choose_grouped(tokens, 8, 4, second=True, groups=True, hopper=False)
        assert tiles.kernel is Kernel.TRITON
    for tokens in (1, 16, 32, 64, 512, 8192):
        for bits, blocks in itertools.product((4, 8), (6, 16)):
            tiles = choose_dense(tokens, blocks, bits=bits, outputs=4096, hopper=False)
            assert tiles.kernel is Kernel.TRITON
            assert blocks % tiles.split == 0


@pytest.mark.parametrize("tokens", [17, 32, 33, 64, 65, 128, 129, 256, 257, 384, 385, 512])
@pytest.mark.parametrize(("outputs", "blocks"), [(5120, 16), (2048, 32), (512, 5), (16384, 64)])
def test_dense_tiles_are_all_computed_at_once(tokens: int, outputs: int, blocks: int) -> None:
    """By the smallest tiles of which that holds, on a GPU of 132 processors."""
    tiles = choose_dense(tokens, blocks, bits=8, outputs=outputs, hopper=True)
    assert tiles.kernel is Kernel.DENSE

    def programs(rows: int, tokens_of_tile: int) -> int:
        return -(-outputs // rows) * -(-tokens // tokens_of_tile)

    largest = (2 * tiles.half, tiles.tokens) == (256, 128)
    assert largest or programs(2 * tiles.half, tiles.tokens) <= 132
    if (2 * tiles.half, tiles.tokens) != (64, 64):
        smaller = (2 * tiles.half, 64) if tiles.tokens == 128 else (tiles.half, 64)
        assert programs(*smaller) > 132


def test_more_tokens_are_dense_tiles_where_all_are_computed_at_once() -> None:
    def tile(tokens: int, outputs: int) -> tuple[int, int] | None:
        tiles = choose_dense(tokens, 16, bits=8, outputs=outputs, hopper=True)
        return (2 * tiles.half, tiles.tokens) if tiles.kernel is Kernel.DENSE else None

    assert [tile(n, 2048) for n in (640, 1024, 1025)] == [(128, 128), (128, 128), None]
    assert [tile(n, 5120) for n in (640, 768, 769)] == [(256, 128), (256, 128), None]
    assert tile(16384, 2048) is None


@pytest.mark.parametrize("outputs", [64, 128, 256])
@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("blocks", [1, 5, 32])
def test_dense_tiles_fit_and_let_results_out(outputs: int, tokens: int, blocks: int) -> None:
    tiles = dense_tile(outputs, tokens, blocks)
    block = (outputs + tokens) * 128
    assert tiles.stages * block <= 192 << 10
    assert tiles.stages * outputs * 128 >= tokens * outputs * 4
    # All of a tile's blocks where they fit, or about as many as that.
    assert tiles.stages >= blocks or (tiles.stages + 1) * block > 192 << 10


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_asked_for_at_once_fit_into_shared_memory(bits: int) -> None:
    for blocks in range(1, 129):
        tiles = choose_at_once(8, blocks, bits=bits)
        split = math.gcd(blocks, 8)
        assert (tiles is None) == (split == 1 or 8 // split * blocks > 32)
        if tiles is None:
            continue
        rows = 2 * tiles.half
        assert blocks % tiles.split == 0
        # Each warp has whole operands of a tensor core.
        assert rows % (16 * tiles.warps // tiles.split) == 0
        assert rows * blocks * 16 * bits <= 64 << 10


def test_few_tokens_of_a_hopper_ask_for_their_weights_at_once() -> None:
    def dense(tokens: int, blocks: int = 16, outputs: int = 5120) -> bool:
        return (
            choose_dense(tokens, blocks, bits=8, outputs=outputs, hopper=True).kernel is Kernel.FEW
        )

    assert all([dense(1), dense(16), dense(1, 32, 2048)])
    # More tokens, the head, and more channels than a program can ask for.
    assert not any([dense(17), dense(1, outputs=151936), dense(1, 112)])

    def grouped(rows: int, blocks: int = 6, tile: int = 16, *, second: bool = True) -> bool:
        tiles = choose_grouped(tile, rows, blocks, second=second, groups=True, hopper=True)
        return tiles.kernel is Kernel.FEW

    assert all([grouped(8), grouped(256)])
    assert not any([grouped(264), grouped(8, 5), grouped(256, tile=32)])
    assert not grouped(8, 16, second=False)
