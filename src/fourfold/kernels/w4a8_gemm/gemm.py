"""The W4A8 products on a GPU: 8-bit activations with 4-bit weights, dense and grouped by expert.

Unlike products that scale groups of weights after the tensor core, all of K is summed by it; see
`packing` for how scales get into the codes. INT8 sums are exact, so a row's result is the same
whatever shares its batch and however it is tiled.

Shapes: T tokens, R rows sorted by expert, E experts, O outputs, K padded input channels, F hidden
width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fourfold.kernels.routing.groups import RowGroups
from fourfold.kernels.w4a8_gemm import reference
from fourfold.kernels.w4a8_gemm.choose import Tiles, choose_dense, choose_grouped
from fourfold.kernels.w4a8_gemm.launch import Product, launch, processors
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
    product = Product(
        x=codes_TK,
        x_scale=scale_T,
        weight=weight.packed_EBOJ,
        w_scale_EO=weight.scale_EO,
        group=weight.group_EGO,
        y=y_TO,
        **_recipe(codes_TK, weight),
    )
    groups = weight.group_EGO is not None
    launch(product, tiles or _dense_tiles(product, groups=groups))
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
    y_TO = torch.empty(
        (codes_TK.shape[0], weight_OK.shape[0]), dtype=out_dtype, device=codes_TK.device
    )
    product = Product(
        x=codes_TK,
        x_scale=scale_T,
        weight=weight_OK,
        w_scale_EO=scale_O[None],
        y=y_TO,
        codes="int8" if codes_TK.dtype == torch.int8 else "fp8",
        unit=1.0,
        span=0,
    )
    launch(product, tiles or _dense_tiles(product))
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
    product = Product(
        x=codes,
        x_scale=scale,
        weight=weight.packed_EBOJ,
        w_scale_EO=weight.scale_EO,
        group=weight.group_EGO,
        y=y,
        groups=groups,
        gather=gather,
        scatter=scatter,
        swiglu=swiglu,
        **_recipe(codes, weight),
    )
    tiles = tiles or choose_grouped(
        groups.tile,
        rows,
        product.blocks,
        second=scatter and gather is None and not swiglu,
        groups=weight.recipe.group is not None,
        hopper=_hopper(),
    )
    launch(product, tiles)
    return y


def _dense_tiles(product: Product, *, groups: bool = False) -> Tiles:
    return choose_dense(
        product.y.shape[0],
        product.blocks,
        bits=product.bits,
        outputs=product.y.shape[1],
        groups=groups,
        hopper=_hopper(),
        processors=processors(product.x.device),
    )


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


@functools.cache
def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
