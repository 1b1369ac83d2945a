"""The W4A8 products and routing on a GPU, against their references on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fourfold.kernels import routing, w4a8_gemm
from fourfold.kernels.routing import reference as routing_reference
from fourfold.kernels.w4a8_gemm import reference
from fourfold.kernels.w4a8_gemm.choose import (
    DENSE_TILES,
    Kernel,
    Tiles,
    choose_at_once,
    choose_grouped,
    dense_tile,
)
from fourfold.kernels.w4a8_gemm.packing import (
    PackedW4A8,
    W4A8Recipe,
    decode_nibbles,
    padded,
    unpack_nibbles,
)
from fourfold.kernels.w4a8_gemm.triton_expand import CODE_UNIT
from fourfold.kernels.w4a8_gemm.triton_gemm import _expand
from fourfold.kernels.w4a8_gemm.triton_swiglu import swiglu
from fourfold.quantize.w4a8 import quantize_w4a8

RECIPES = list(W4A8Recipe)
IS_HOPPER = torch.cuda.get_device_capability() == (9, 0)
ON_HOPPER = pytest.mark.skipif(not IS_HOPPER, reason="the Gluon form is Hopper's")


def quantized_rows(x_TI: torch.Tensor, recipe: W4A8Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, padded I] and scales [T]."""
    largest = 127.0 if recipe.activations == torch.int8 else 448.0
    scale_T = x_TI.abs().amax(-1).clamp_min(1e-30) / largest
    scaled = x_TI / scale_T[:, None]
    if recipe.activations == torch.int8:
        scaled = scaled.round()
    scaled = torch.nn.functional.pad(scaled, (0, padded(x_TI.shape[1]) - x_TI.shape[1]))
    return scaled.to(recipe.activations), scale_T


def random_rows(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, device="cuda")
    x[..., ::97] *= 20
    return x


def random_weight(experts: int, outputs: int, inputs: int, recipe: W4A8Recipe) -> PackedW4A8:
    return quantize_w4a8(random_rows(experts, outputs, inputs), recipe)


def poison() -> None:
    """Leaves NaNs in the memory that the next outputs are given."""
    blocks = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]
    del blocks


def assert_equal(out: torch.Tensor, wanted: torch.Tensor, recipe: W4A8Recipe) -> None:
    if recipe.activations == torch.int8:
        assert torch.equal(out, wanted)
    else:
        # Hopper keeps 14 bits of a sum of e4m3 products while it adds them up.
        error = (out - wanted).double().norm() / wanted.double().norm()
        assert error < 2e-3


@triton.jit
def _expand_tile(
    packed, low, high, out, CODES: tl.constexpr, SPAN: tl.constexpr, ASM: tl.constexpr
):
    rows, j = tl.arange(0, 64), tl.arange(0, 64)
    tile = tl.load(packed + rows[:, None] * 64 + j[None, :])
    a, b = _expand(tile, tl.load(low + rows), tl.load(high + rows), CODES, SPAN, ASM)
    tl.store(out + rows[:, None] * 128 + j[None, :], a.to(tl.float32))
    tl.store(out + rows[:, None] * 128 + 64 + j[None, :], b.to(tl.float32))


@pytest.mark.parametrize("recipe", RECIPES)
def test_inline_assembly_expands_as_its_twin(recipe: W4A8Recipe) -> None:
    packed = torch.randint(256, (1, 1, 64, 64), dtype=torch.uint8, device="cuda")
    group = None
    if recipe is W4A8Recipe.FP8_G128:
        group = torch.randint(13, (1, 1, 64), dtype=torch.uint8, device="cuda")
    elif recipe.group is not None:
        size = (1, 128 // recipe.group, 64)
        step = torch.randint(1, 17, size, device="cuda")
        offset = (torch.rand(size, device="cuda") * (256 - 15 * step)).int()
        group = (step + 256 * offset).to(torch.int16)
    # Channels, low and high, that share a group have the same parameters.
    params = packed[0] if group is None else group[0]
    outs = []
    for asm in (True, False):
        out = torch.full((64, 128), torch.nan, device="cuda")
        codes = "int8" if recipe.activations == torch.int8 else "fp8"
        span = recipe.group or 0
        _expand_tile[(1,)](packed, params[0], params[-1], out, CODES=codes, SPAN=span, ASM=asm)
        outs.append(out * CODE_UNIT[recipe])
    assert torch.equal(outs[0], outs[1])
    nibbles = unpack_nibbles(packed, recipe)
    assert torch.equal(outs[0], decode_nibbles(nibbles, group, recipe)[0])


@triton.jit
def _swiglu(gate, up, out, ASM: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out + i, swiglu(tl.load(gate + i), tl.load(up + i), ASM))


def test_inline_assembly_ends_where_its_twin_does() -> None:
    ends = torch.tensor([-torch.inf, -1e30, -104, -88.5, -87, 88.5, 1e30, torch.inf, torch.nan])
    gate = torch.cat([torch.linspace(-110, 110, 256 - len(ends)), ends]).cuda()
    up, (ours, twin) = torch.full_like(gate, 1.5), torch.empty(2, 256, device="cuda")
    _swiglu[(1,)](gate, up, ours, ASM=True)
    _swiglu[(1,)](gate, up, twin, ASM=False)
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [1, 17, 300, 1500])
@pytest.mark.parametrize("shape", [(528, 200), (2048, 1024)])
def test_dense_product(recipe: W4A8Recipe, tokens: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(tokens)
    weight = random_weight(1, *shape, recipe)
    rows = quantized_rows(random_rows(tokens, shape[1]), recipe)
    wanted = reference.w4a8_gemm(*rows, weight, out_dtype=torch.float32)
    poison()
    out = w4a8_gemm.w4a8_gemm(*rows, weight, out_dtype=torch.float32)
    assert_equal(out, wanted, recipe)
    assert torch.equal(out, w4a8_gemm.w4a8_gemm(*rows, weight, out_dtype=torch.float32))
    half = w4a8_gemm.w4a8_gemm(*rows, weight, out_dtype=torch.bfloat16)
    assert torch.equal(half, out.bfloat16())
    if shape[1] == 200:
        return
    few = Tiles(16, 16, 4, 4, 8, split=4)
    assert_equal(
        w4a8_gemm.w4a8_gemm(*rows, weight, out_dtype=torch.float32, tiles=few), wanted, recipe
    )
    if not IS_HOPPER:
        return
    hopper = Tiles(128, 128, 5, 4, 1, kernel=Kernel.RING)
    assert_equal(
        w4a8_gemm.w4a8_gemm(*rows, weight, out_dtype=torch.float32, tiles=hopper), wanted, recipe
    )


@pytest.mark.parametrize("tokens", [1, 19, 40, 200, 1500])
@pytest.mark.parametrize("inputs", [640, 1024])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_product_of_8_bit_weights(tokens: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    recipe = W4A8Recipe.INT8_CHANNEL if dtype == torch.int8 else W4A8Recipe.FP8_CHANNEL
    weight, scale_O = quantized_rows(random_rows(1008, inputs), recipe)
    rows = quantized_rows(random_rows(tokens, inputs), recipe)
    arguments = (*rows, weight, scale_O)
    poison()
    out = w4a8_gemm.w8a8_gemm(*arguments, out_dtype=torch.float32)
    assert_equal(out, reference.w8a8_gemm(*arguments, out_dtype=torch.float32), recipe)


@ON_HOPPER
@pytest.mark.parametrize("tokens", [1, 17, 33, 64, 127, 200, 257])
@pytest.mark.parametrize(("outputs", "tile"), DENSE_TILES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dense_tiles(tokens: int, outputs: int, tile: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    recipe = W4A8Recipe.INT8_CHANNEL if dtype == torch.int8 else W4A8Recipe.FP8_CHANNEL
    for inputs in (640, 2048):
        weight, scale_O = quantized_rows(random_rows(1008, inputs), recipe)
        arguments = (*quantized_rows(random_rows(tokens, inputs), recipe), weight, scale_O)
        tiles = dense_tile(outputs, tile, inputs // 128)
        for dtype_out in (torch.float32, torch.bfloat16):
            wanted = reference.w8a8_gemm(*arguments, out_dtype=dtype_out)
            poison()
            out = w4a8_gemm.w8a8_gemm(*arguments, out_dtype=dtype_out, tiles=tiles)
            if dtype_out == torch.float32 or dtype == torch.int8:
                assert_equal(out, wanted, recipe)
            again = w4a8_gemm.w8a8_gemm(*arguments, out_dtype=dtype_out, tiles=tiles)
            assert torch.equal(out, again)


@ON_HOPPER
@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dense_weights_at_once(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    recipe = W4A8Recipe.INT8_CHANNEL if dtype == torch.int8 else W4A8Recipe.FP8_CHANNEL
    for inputs in (256, 768, 4096):
        weight, scale_O = quantized_rows(random_rows(1000, inputs), recipe)
        arguments = (*quantized_rows(random_rows(tokens, inputs), recipe), weight, scale_O)
        wanted = reference.w8a8_gemm(*arguments, out_dtype=torch.float32)
        tiles = choose_at_once(tokens, inputs // 128, bits=8)
        assert tiles is not None
        poison()
        out = w4a8_gemm.w8a8_gemm(*arguments, out_dtype=torch.float32, tiles=tiles)
        assert_equal(out, wanted, recipe)


def routed(tokens: int, choices: int, experts: int, how: str) -> torch.Tensor:
    if how == "one expert":
        return torch.full((tokens, choices), experts // 2, device="cuda", dtype=torch.int32)
    chance = torch.ones(experts, device="cuda")
    if how == "zipf":
        chance = 1 / torch.arange(1, experts + 1, device="cuda")
    noise = torch.rand(tokens, experts, device="cuda").log().neg()
    return (noise / chance).topk(choices, largest=False).indices.to(torch.int32)


@pytest.mark.parametrize("tokens", [1, 7, 200, 5000])
@pytest.mark.parametrize("how", ["uniform", "zipf", "one expert"])
def test_rows_are_grouped(tokens: int, how: str) -> None:
    experts_TK = routed(tokens, 8, 100, how)
    wanted = routing_reference.group_rows(experts_TK.cpu(), 100)
    poison()
    groups = routing.group_rows(experts_TK, 100)
    assert torch.equal(groups.order_R.cpu(), wanted.order_R)
    assert torch.equal(groups.ends_E.cpu(), wanted.ends_E)
    there = wanted.tiles_3N[0] >= 0
    assert torch.equal(groups.tiles_3N[0].cpu(), wanted.tiles_3N[0])
    assert torch.equal(groups.tiles_3N.cpu()[:, there], wanted.tiles_3N[:, there])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [1, 9, 1000, 5000])
@pytest.mark.parametrize("how", ["zipf", "one expert"])
@pytest.mark.parametrize("hopper", [False, pytest.param(True, marks=ON_HOPPER)])
def test_experts_ffn(recipe: W4A8Recipe, tokens: int, how: str, hopper: bool) -> None:
    torch.manual_seed(tokens)
    experts, choices, width, hidden = 24, 4, 464, 208
    experts_TK = routed(tokens, choices, experts, how)
    groups = routing.group_rows(experts_TK, experts)
    sizes, options = (groups.tile, experts_TK.numel()), {"groups": hopper, "hopper": hopper}
    of_first = choose_grouped(*sizes, 4, second=False, **options)
    of_second = choose_grouped(*sizes, 2, second=True, **options)
    gate_up = random_weight(experts, 2 * hidden, width, recipe)
    down = random_weight(experts, width, hidden, recipe)
    rows = quantized_rows(random_rows(tokens, width), recipe)
    first = {"gather": choices, "scatter": False, "swiglu": True, "out_dtype": torch.float32}
    second = {"gather": None, "scatter": True, "swiglu": False, "out_dtype": torch.float32}
    wanted = reference.grouped_w4a8_gemm(*rows, gate_up, groups, **first)
    poison()
    out = w4a8_gemm.grouped_w4a8_gemm(*rows, gate_up, groups, **first, tiles=of_first)
    torch.testing.assert_close(out, wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().max()))
    again = w4a8_gemm.grouped_w4a8_gemm(*rows, gate_up, groups, **first, tiles=of_first)
    assert torch.equal(out, again)
    rows = quantized_rows(wanted, recipe)
    wanted = reference.grouped_w4a8_gemm(*rows, down, groups, **second)
    poison()
    out = w4a8_gemm.grouped_w4a8_gemm(*rows, down, groups, **second, tiles=of_second)
    assert_equal(out, wanted, recipe)
    gates_TK = torch.rand(tokens, choices, device="cuda")
    out_TKD = out.view(tokens, choices, width)
    y_TD = routing.combine(out_TKD, gates_TK, out_dtype=torch.bfloat16)
    wanted = routing_reference.combine(out_TKD, gates_TK, out_dtype=torch.float64)
    # What cancels out leaves the rounding of what was added.
    atol = 1e-5 * float(out.abs().max())
    torch.testing.assert_close(y_TD.double(), wanted, rtol=2**-8, atol=atol)
    assert torch.equal(y_TD, routing.combine(out_TKD, gates_TK, out_dtype=torch.bfloat16))


@ON_HOPPER
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [1, 3, 9, 32])
@pytest.mark.parametrize("how", ["uniform", "one expert", "padding"])
def test_weights_of_second_products_at_once(recipe: W4A8Recipe, tokens: int, how: str) -> None:
    torch.manual_seed(tokens)
    experts, choices = 16, 8
    live_T = None
    if how == "padding":
        live_T = (torch.arange(tokens, device="cuda") % 3 != 1).int()
    groups = routing.group_rows(
        routed(tokens, choices, experts, how), experts, tile=16, live_T=live_T
    )
    options = {"gather": None, "scatter": True, "swiglu": False, "out_dtype": torch.float32}
    for width, hidden in ((464, 208), (520, 768)):
        down = random_weight(experts, width, hidden, recipe)
        rows = quantized_rows(random_rows(tokens * choices, hidden), recipe)
        goals = groups.order_R[: int(groups.ends_E[-1])].long()
        wanted = reference.grouped_w4a8_gemm(*rows, down, groups, **options)
        tiles = choose_at_once(16, padded(hidden) // 128, bits=4)
        assert tiles is not None
        poison()
        out = w4a8_gemm.grouped_w4a8_gemm(*rows, down, groups, **options, tiles=tiles)
        assert_equal(out[goals], wanted[goals], recipe)


def test_a_graph_follows_the_routing() -> None:
    """Nothing of a routing is kept on the host: a captured FFN computes any other."""
    recipe, experts, choices = W4A8Recipe.INT8_G128, 16, 2
    gate_up = random_weight(experts, 256, 128, recipe)
    rows = quantized_rows(random_rows(700, 128), recipe)
    experts_TK = routed(700, choices, experts, "uniform")
    first = {"gather": choices, "scatter": True, "swiglu": True, "out_dtype": torch.float32}

    def product() -> torch.Tensor:
        groups = routing.group_rows(experts_TK, experts)
        return w4a8_gemm.grouped_w4a8_gemm(*rows, gate_up, groups, **first)

    product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product()
    for how in ("zipf", "one expert"):
        experts_TK.copy_(routed(700, choices, experts, how))
        graph.replay()
        assert torch.equal(out, product())
