"""Random weights drawn as codes, for models that are only measured.

Codes are even over all values that a kernel reads, so that tensor cores switch as many bits as they
ever do; scales give the weights the deviation that was asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.cpu_w8a8_gemm import LIMIT
from fourfold.kernels.w4a8_gemm.packing import (
    BLOCK,
    HALF,
    PackedW4A8,
    W4A8Recipe,
    decode_with,
    padded,
)


def random_w4a8(
    shape: tuple[int, int, int], recipe: W4A8Recipe, deviation: float, generator: torch.Generator
) -> PackedW4A8:
    """Packed weights [E, O, K] on the generator's device."""
    experts, outputs, inputs = shape
    width, device = padded(inputs), generator.device
    packed_EBOJ = torch.empty(
        experts, width // BLOCK, outputs, HALF, dtype=torch.uint8, device=device
    )
    packed_EBOJ.random_(0, 256, generator=generator)
    group = _usual_group(recipe)
    codes = decode_with(torch.arange(16, dtype=torch.uint8), group, recipe)
    scale = deviation / float(codes.square().mean().sqrt())
    group_EGO = None
    if group is not None and recipe.group is not None:
        groups = (experts, width // recipe.group, outputs)
        group_EGO = torch.full(groups, int(group), dtype=group.dtype, device=device)
    scale_EO = torch.full((experts, outputs), scale, device=device)
    return PackedW4A8(recipe, inputs, packed_EBOJ, scale_EO, group_EGO)


def _usual_group(recipe: W4A8Recipe) -> Tensor | None:
    """Parameters of a group as real weights have them: levels of step 10 about zero, or an
    exponent of 10."""
    if recipe.group is None:
        return None
    if recipe is W4A8Recipe.FP8_G128:
        return torch.tensor(10, dtype=torch.uint8)
    return torch.tensor(10 | (128 - 75) << 8, dtype=torch.int16)


def random_int8(
    shape: tuple[int, int, int], deviation: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Codes [E, O, K] and scales [E, O] of int8 weights on the generator's device."""
    codes_EOK = torch.empty(shape, dtype=torch.int8, device=generator.device)
    codes_EOK.random_(-LIMIT, LIMIT + 1, generator=generator)
    scale = deviation * 3**0.5 / LIMIT
    return codes_EOK, torch.full(shape[:2], scale, device=generator.device)
