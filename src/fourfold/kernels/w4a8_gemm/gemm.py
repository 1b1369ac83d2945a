"""The W4A8 products on a GPU: 8-bit activations with 4-bit weights, dense and grouped by expert.

Unlike products that scale groups of weights after the tensor core, all of K is summed by it; see
`packing` for how scales get into the codes. INT8 sums are exact, so a row's result is the same
whatever shares its batch and however it is tiled.

Shapes: T tokens, R rows sorted by expert, E experts, O outputs, K padded input channels, F hidden
width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.routing.groups import RowGroups
from fourfold.kernels.w4a8_gemm import reference
from fourfold.kernels.w4a8_gemm.choose import (
    FEW_TOKENS,
    MOST_SPLIT_TOKENS,
    Tiles,
    choose_dense,
    choose_grouped,
    hopper_stages,
)
from fourfold.kernels.w4a8_gemm.packing import BLOCK, PackedW4A8


def w4a8_gemm(
    codes_TK: Tensor,
    scale_T: Tensor,
    weight: PackedW4A8,
    *,
    out_dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """Products of rows with one weight; returns [T, O].

    Args:
        codes_TK: codes of the recipe's activations [T, K], contiguous; padding channels are zero.
        scale_T: float32 [T], `x ~ codes * scale`.
        weight: packed, of one expert.
        out_dtype: float32, bfloat16 or float16.
        tiles: how to cut the product; chosen by default.
    """
    assert weight.packed_EBOJ.shape[0] == 1, weight.packed_EBOJ.shape
    if not codes_TK.is_cuda and tiles is None:
        return reference.w4a8_gemm(codes_TK, scale_T, weight, out_dtype=out_dtype)
    tokens, outputs = codes_TK.shape[0], weight.scale_EO.shape[1]
    y_TO = torch.empty((tokens, outputs), dtype=out_dtype, device=codes_TK.device)
    _launch(
        codes_TK,
        scale_T,
        weight.packed_EBOJ,
        weight.scale_EO,
        weight.group_EGO,
        y_TO,
        tiles
        or choose_dense(
            tokens,
            codes_TK.shape[1] // BLOCK,
            bits=4,
            outputs=outputs,
            groups=weight.group_EGO is not None,
            hopper=_hopper(),
        ),
        **_recipe(codes_TK, weight),
    )
    return y_TO


def w8a8_gemm(
    codes_TK: Tensor,
    scale_T: Tensor,
    weight_OK: Tensor,
    scale_O: Tensor,
    *,
    out_dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """Products of rows with a weight of 8 bits; returns [T, O].

    Args:
        codes_TK: int8 or float8_e4m3fn [T, K], contiguous, K a multiple of 128.
        scale_T: float32 [T], `x ~ codes * scale`.
        weight_OK: codes [O, K] in the dtype of the activations, contiguous.
        scale_O: float32 [O].
        out_dtype: float32, bfloat16 or float16.
        tiles: how to cut the product; chosen by default.
    """
    assert weight_OK.dtype == codes_TK.dtype, weight_OK.dtype
    assert weight_OK.is_contiguous(), weight_OK.shape
    assert weight_OK.shape[1] == codes_TK.shape[1], (weight_OK.shape, codes_TK.shape)
    assert codes_TK.shape[1] % BLOCK == 0, f"{codes_TK.shape[1]} channels are not whole blocks"
    if not codes_TK.is_cuda and tiles is None:
        return reference.w8a8_gemm(codes_TK, scale_T, weight_OK, scale_O, out_dtype=out_dtype)
    tokens, inputs = codes_TK.shape
    outputs = weight_OK.shape[0]
    y_TO = torch.empty((tokens, outputs), dtype=out_dtype, device=codes_TK.device)
    blocks = inputs // BLOCK
    tiles = tiles or choose_dense(tokens, blocks, bits=8, outputs=outputs, hopper=_hopper())
    if tiles.dense:
        _launch_dense(codes_TK, scale_T, weight_OK, scale_O, y_TO, tiles)
        return y_TO
    _launch(
        codes_TK,
        scale_T,
        weight_OK,
        scale_O[None],
        None,
        y_TO,
        tiles,
        codes="int8" if codes_TK.dtype == torch.int8 else "fp8",
        unit=1.0,
        span=0,
    )
    return y_TO


def grouped_w4a8_gemm(
    codes: Tensor,
    scale: Tensor,
    weight: PackedW4A8,
    groups: RowGroups,
    *,
    gather: int | None,
    scatter: bool,
    swiglu: bool,
    out_dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """Products of rows with their experts' weights.

    Args:
        codes: codes of the recipe's activations, contiguous: of tokens [T, K] with `gather`, of
            sorted rows [R, K] without; padding channels are zero.
        scale: float32 [T] or [R].
        weight: the experts' weights; with `swiglu` [E, 2F, K], the gate's rows first.
        groups: the rows of each expert.
        gather: the choices of a token: a row's codes are those of token `row // gather`. None where
            the codes lie in sorted order, and then a later kernel than those that made `groups`
            has to have made them: groups are read before the kernel in front has ended.
        scatter: whether results are written to their rows' flat places, or in sorted order.
        swiglu: whether `silu(gate) * up` is returned.
        out_dtype: float32, bfloat16 or float16.
        tiles: how to cut the product; chosen by default.

    Returns:
        [R, O], or [R, F] with `swiglu`; rows that belong to no expert are left undefined.
    """
    rows, outputs = groups.order_R.numel(), weight.scale_EO.shape[1]
    assert groups.ends_E.numel() == weight.packed_EBOJ.shape[0], groups.ends_E.shape
    assert codes.shape[0] * (gather or 1) == rows, (codes.shape, rows)
    assert not swiglu or outputs % 2 == 0, outputs
    if not codes.is_cuda and tiles is None:
        return reference.grouped_w4a8_gemm(
            codes,
            scale,
            weight,
            groups,
            gather=gather,
            scatter=scatter,
            swiglu=swiglu,
            out_dtype=out_dtype,
        )
    width = outputs // 2 if swiglu else outputs
    y = torch.empty((rows, width), dtype=out_dtype, device=codes.device)
    _launch(
        codes,
        scale,
        weight.packed_EBOJ,
        weight.scale_EO,
        weight.group_EGO,
        y,
        tiles
        or choose_grouped(
            groups.tile,
            rows,
            codes.shape[1] // BLOCK,
            second=gather is None and scatter and not swiglu,
            groups=weight.recipe.group is not None,
            hopper=_hopper(),
        ),
        groups=groups,
        gather=gather,
        scatter=scatter,
        swiglu=swiglu,
        **_recipe(codes, weight),
    )
    return y


def _recipe(codes: Tensor, weight: PackedW4A8) -> dict[str, Any]:
    from fourfold.kernels.w4a8_gemm.triton_expand import CODE_UNIT

    recipe = weight.recipe
    assert codes.dtype == recipe.activations, (codes.dtype, recipe)
    assert codes.shape[1] == weight.packed_EBOJ.shape[1] * BLOCK, codes.shape
    return {
        "codes": recipe.value.partition("-")[0],
        "unit": CODE_UNIT[recipe],
        "span": recipe.group or 0,
    }


def _launch(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale_EO: Tensor,
    group: Tensor | None,
    y: Tensor,
    tiles: Tiles,
    *,
    codes: str,
    unit: float,
    span: int,
    groups: RowGroups | None = None,
    gather: int | None = None,
    scatter: bool = False,
    swiglu: bool = False,
) -> None:
    assert x.is_contiguous(), x.shape
    assert x_scale.dtype == torch.float32, x_scale.dtype
    assert groups is None or groups.tile == tiles.tokens, (groups, tiles)
    assert not tiles.dense, tiles
    tokens, width = y.shape
    bits = 4 if weight.dtype == torch.uint8 else 8
    columns = -(-width // (tiles.half if swiglu else 2 * tiles.half))
    many = groups.tiles_3N.shape[1] if groups is not None else -(-tokens // tiles.tokens)
    programs = min(many * columns, tiles.programs * _processors(x.device))
    arguments = (
        x,
        x_scale,
        weight,
        w_scale_EO,
        group if group is not None else weight,
        groups.order_R if groups is not None else weight,
        groups.tiles_3N if groups is not None else weight,
        y,
        tokens,
        w_scale_EO.shape[1],
        x.shape[1],
        many,
        width,
    )
    blocks = x.shape[1] // BLOCK
    assert blocks % tiles.split == 0, (blocks, tiles)
    early = overlaps_launches(x.device)
    options: dict[str, Any] = {
        "UNIT": unit,
        "SPAN": span,
        "GROUPED": groups is not None,
        "CHOICES": gather or 0,
        "SCATTER": scatter,
        "SWIGLU": swiglu,
        "TILE": tiles.tokens,
        "STAGES": tiles.stages,
        "num_warps": tiles.warps,
    }
    if tiles.at_once:
        assert (bits == 4) == (groups is not None) == scatter, (weight.dtype, groups, scatter)
        assert gather is None, gather
        assert not swiglu
        assert tiles.tokens <= FEW_TOKENS, tiles
        _launch_at_once((columns, many), arguments[:-1], tiles, codes == "int8", unit, span)
    elif tiles.hopper:
        if group is not None:
            # Parameters are copied by words of 32 bits.
            of_word = 4 // group.element_size()
            assert w_scale_EO.shape[1] % of_word == width % of_word == 0, (width, of_word)
        options["INT8"] = codes == "int8"
        options["BITS"] = bits
        options["STAGES"] = hopper_stages(tiles, y.element_size(), bits)
        assert tiles.split == 1 or tiles.tokens <= MOST_SPLIT_TOKENS, tiles
        options["UNROLL"] = math.gcd(tiles.unroll, blocks // tiles.split)
        options["SPLIT"] = tiles.split > 1
        if tiles.split > 1:
            options["maxnreg"] = 80  # two programs share a processor
        _launch_hopper(programs, arguments, options)
    else:
        from fourfold.kernels.w4a8_gemm import triton_gemm

        triton_gemm._gemm[(programs,)](
            *arguments,
            CODES=codes,
            BITS=bits,
            HALF=tiles.half,
            SPLIT=tiles.split,
            ASM=x.is_cuda,
            EARLY=early,
            launch_pdl=early,
            **options,
        )


def _launch_hopper(programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from fourfold.kernels.w4a8_gemm import gluon_gemm

    x, x_scale, weight, *others = arguments
    rows = weight.view(-1, weight.shape[-1])
    shared = gl.NVMMASharedLayout(64, 8, 2)
    copies = TensorDescriptor.from_tensor(rows, list(gluon_gemm.BOX), shared)
    gluon_gemm._gemm[(programs,)](
        x, x_scale, copies, *others, EARLY=True, launch_pdl=True, **options
    )


def _launch_dense(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, y: Tensor, tiles: Tiles
) -> None:
    """Launches the kernel that is for weights of 8 bits alone."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from fourfold.kernels.w4a8_gemm import gluon_dense

    assert x.is_contiguous(), x.shape
    assert x_scale.dtype == w_scale.dtype == torch.float32, (x_scale.dtype, w_scale.dtype)
    tokens, inputs = x.shape
    outputs, rows = w_scale.shape[0], 2 * tiles.half
    # Results leave through the ring of weights.
    assert tiles.stages * BLOCK >= tiles.tokens * y.element_size(), tiles
    many = -(-tokens // tiles.tokens)
    shared = gl.NVMMASharedLayout(128, 8, 2)
    gluon_dense._gemm[(many * -(-outputs // rows),)](
        TensorDescriptor.from_tensor(x, [tiles.tokens, BLOCK], shared),
        TensorDescriptor.from_tensor(weight, [rows, BLOCK], shared),
        x_scale,
        w_scale,
        y,
        tokens,
        outputs,
        inputs,
        many,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        # Fewer registers than there are, so that a program starts beside the kernel in front.
        maxnreg=128 if rows <= 128 else None,
        launch_pdl=True,
    )


def _launch_at_once(
    grid: tuple[int, int],
    arguments: tuple[Any, ...],
    tiles: Tiles,
    int8: bool,
    unit: float,
    span: int,
) -> None:
    from fourfold.kernels.w4a8_gemm import gluon_few

    gluon_few._gemm[grid](
        *arguments,
        UNIT=unit,
        INT8=int8,
        SPAN=span,
        ROWS=2 * tiles.half,
        TILE=tiles.tokens,
        SPLIT=tiles.split,
        num_warps=tiles.warps,
        launch_pdl=True,
    )


@functools.cache
def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
