"""The products in Qwen3-30B-A3B's shapes, each to be computed with any tiles.

Shapes: T tokens, E experts, O outputs, I inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fourfold.bench.kernels.cases.w4a8_gemm import random_experts, random_rows
from fourfold.bench.tiles.candidates import candidates
from fourfold.bench.tiles.config import Product
from fourfold.kernels.routing import RowGroups, group_rows
from fourfold.kernels.rows import quantize_rows
from fourfold.kernels.w4a8_gemm import grouped_w4a8_gemm, w4a8_gemm, w8a8_gemm
from fourfold.kernels.w4a8_gemm.choose import Tiles, choose_dense, choose_grouped
from fourfold.kernels.w4a8_gemm.packing import BLOCK, PackedW4A8, W4A8Recipe
from fourfold.quantize.random_codes import random_w4a8

_EXPERTS, _CHOICES = 128, 8
_PROJECTIONS = ((5120, 2048), (2048, 4096))
_FIRST, _SECOND = (2 * 768, 2048), (2048, 768)


@dataclasses.dataclass(frozen=True)
class Work:
    """One product at one number of tokens."""

    name: str
    chosen: Tiles
    candidates: tuple[Tiles, ...]
    """All but the chosen one."""
    run: Callable[[Tiles], Tensor]


def works(
    product: Product,
    counts: tuple[int, ...],
    recipe: W4A8Recipe,
    device: torch.device,
    *,
    hopper: bool,
) -> Iterator[Work]:
    """A product at each number of tokens, 4-bit weights as `recipe` has them; its weights live as
    long as one of them."""
    if product in ("experts-first", "experts-second"):
        yield from _experts(product, counts, recipe, device, hopper)
    else:
        for outputs, inputs in _PROJECTIONS:
            yield from _projection(product, counts, outputs, inputs, recipe, device, hopper)


def _projection(
    product: Product,
    counts: tuple[int, ...],
    outputs: int,
    inputs: int,
    recipe: W4A8Recipe,
    device: torch.device,
    hopper: bool,
) -> Iterator[Work]:
    bits, blocks = (8 if product == "projections-8" else 4), inputs // BLOCK
    product_of: Callable[..., Tensor]
    kind, groups, dtype = str(product), False, torch.int8
    if bits == 8:
        weight_OI = random_rows(outputs, inputs, device=device) * inputs**-0.5
        rows = quantize_rows(weight_OI, torch.int8, inputs)
        product_of = partial(_product_8, weight_OI=rows.codes_TW, scale_O=rows.scale_T)
    else:
        product_of = partial(_product_4, weight=_random(1, outputs, inputs, recipe, device))
        groups, dtype = recipe.group is not None, recipe.activations
        kind = f"{product}, {recipe}"
    for tokens in counts:
        x = quantize_rows(random_rows(tokens, inputs, device=device), dtype, inputs)
        chosen = choose_dense(
            tokens, blocks, bits=bits, outputs=outputs, groups=groups, hopper=hopper
        )
        others = candidates(tokens, blocks, bits=bits, grouped=False, second=False, hopper=hopper)
        yield Work(
            f"{kind}, {tokens} x {outputs} x {inputs}",
            chosen,
            tuple(each for each in others if each != chosen),
            partial(product_of, *x),
        )


def _product_8(
    codes_TI: Tensor, scale_T: Tensor, tiles: Tiles, *, weight_OI: Tensor, scale_O: Tensor
) -> Tensor:
    return w8a8_gemm(codes_TI, scale_T, weight_OI, scale_O, out_dtype=torch.bfloat16, tiles=tiles)


def _product_4(codes_TI: Tensor, scale_T: Tensor, tiles: Tiles, *, weight: PackedW4A8) -> Tensor:
    return w4a8_gemm(codes_TI, scale_T, weight, out_dtype=torch.bfloat16, tiles=tiles)


def _experts(
    product: Product,
    counts: tuple[int, ...],
    recipe: W4A8Recipe,
    device: torch.device,
    hopper: bool,
) -> Iterator[Work]:
    first = product == "experts-first"
    outputs, inputs = _FIRST if first else _SECOND
    weight = _random(_EXPERTS, outputs, inputs, recipe, device)
    blocks = inputs // BLOCK
    for tokens in counts:
        experts_TK = random_experts(tokens, "uniform", device)
        rows = tokens * _CHOICES
        x = quantize_rows(
            random_rows(tokens if first else rows, inputs, device=device),
            recipe.activations,
            inputs,
        )
        tile = group_rows(experts_TK, _EXPERTS).tile
        chosen = choose_grouped(
            tile, rows, blocks, second=not first, groups=recipe.group is not None, hopper=hopper
        )
        others = candidates(
            2 * rows // _EXPERTS, blocks, bits=4, grouped=True, second=not first, hopper=hopper
        )
        tried = tuple(each for each in others if each != chosen)
        sizes = {each.tokens for each in (chosen, *tried)}
        groups = {size: group_rows(experts_TK, _EXPERTS, tile=size) for size in sizes}
        yield Work(
            f"{product}, {recipe}, {tokens} tokens of {_EXPERTS} experts x {outputs} x {inputs}",
            chosen,
            tried,
            partial(_grouped, *x, weight=weight, groups=groups, first=first),
        )


def _random(
    experts: int, outputs: int, inputs: int, recipe: W4A8Recipe, device: torch.device
) -> PackedW4A8:
    generator = torch.Generator(device).manual_seed(0)
    return random_w4a8((experts, outputs, inputs), recipe, inputs**-0.5, generator)


def _grouped(
    codes: Tensor,
    scale: Tensor,
    tiles: Tiles,
    *,
    weight: PackedW4A8,
    groups: dict[int, RowGroups],
    first: bool,
) -> Tensor:
    return grouped_w4a8_gemm(
        codes,
        scale,
        weight,
        groups[tiles.tokens],
        gather=_CHOICES if first else None,
        scatter=not first,
        swiglu=first,
        out_dtype=torch.bfloat16,
        tiles=tiles,
    )
