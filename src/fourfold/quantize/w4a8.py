"""Choosing 4-bit codes for weights: grids, and rounding to the nearest point of one.

A grid is fitted in two steps, so that calibration can move the weights in between: a scale for each
output channel from the whole row, then parameters for each group of input channels from the
weights as they are when the group's turn comes.

- INT8_CHANNEL, FP8_CHANNEL: codes -7..7 times the channel's scale.
- INT8_G128, INT8_G64 (progressive; QServe, Lin et al. 2024): the channel's scale makes the row
  8-bit within +-119, a group maps 16 levels onto it by an integer step and offset, so the kernel
  expands nibbles to int8 before its product and nothing is scaled after it.
- FP8_G128: a group multiplies by a power of two, which is an addition to e4m3's exponent.

Shapes: E experts, O output channels, K input channels, G groups of `group` input channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import (
    PackedW4A8,
    W4A8Recipe,
    decode_with,
    pack_nibbles,
    padded,
)
from fourfold.kernels.w4a8_pack import pack_nearest

_PROTECTIVE = 119.0  # so that no nibble * step + offset leaves 8 bits (QServe, section 4.2)
_MAGNITUDE = 7.0
_LEVELS = 15.0
_EXPONENTS = 12
_CUTS, _CUT = 9, 0.05
_TINY = 1e-30
# Weights that are rounded together, on a GPU and on a CPU.
_PIECE = (1 << 26, 1 << 18)


def fit_channels(
    weight_EOK: Tensor, recipe: W4A8Recipe, importance_EK: Tensor | None = None
) -> Tensor:
    """The scale of every output channel, float32 [E, O].

    Where it alone makes the grid, the largest weights are cut off as far as the rest gains by it;
    `importance_EK` >= 0 weighs channels in that (mean squared inputs, say).
    """
    largest = weight_EOK.abs().amax(-1).float().clamp_min(_TINY)
    if recipe is W4A8Recipe.FP8_G128:
        return largest / (_MAGNITUDE * 2.0**_EXPONENTS)
    if recipe.group is not None:
        return largest / _PROTECTIVE
    best, least = largest / _MAGNITUDE, torch.full_like(largest, torch.inf)
    for step in range(_CUTS):
        scale = largest * ((1 - step * _CUT) / _MAGNITUDE)
        scaled = weight_EOK / scale[..., None]
        error = (scaled.round().clamp_(-_MAGNITUDE, _MAGNITUDE) - scaled).square_()
        if importance_EK is not None:
            error *= importance_EK[:, None]
        lost = error.sum(-1) * scale.square()
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best


def fit_groups(
    scaled_EOGk: Tensor, recipe: W4A8Recipe, importance_EGk: Tensor | None = None
) -> Tensor | None:
    """Parameters [E, O, G] of groups of weights that are divided by their channel's scale already,
    [E, O, G, group]; in the dtype that `PackedW4A8.group_EGO` keeps. None where there are none.

    Of the parameters near those that span a group, the ones that round it with the least error,
    weighted by `importance_EGk` where given.
    """
    if recipe.group is None:
        return None
    if recipe is W4A8Recipe.FP8_G128:
        largest = scaled_EOGk.abs().amax(-1).clamp_min(_TINY)
        # The logarithm, rounded up.
        fraction, exponent = torch.frexp(largest / _MAGNITUDE)
        needed = (exponent - (fraction == 0.5).to(exponent.dtype)).clamp(0, _EXPONENTS)
        candidates = [(needed - cut).clamp_min(0).to(torch.uint8) for cut in (1, 0)]
    else:
        low = scaled_EOGk.amin(-1).clamp(-_PROTECTIVE, _PROTECTIVE)
        high = scaled_EOGk.amax(-1).clamp(-_PROTECTIVE, _PROTECTIVE)
        needed = ((high - low.round()) / _LEVELS).ceil().clamp(1, 16)
        candidates = []
        for cut in (0, 1, 2, 3):
            step = (needed - cut).clamp_min(1)
            for shift in (-0.5, 0, 0.5) if cut else (0,):
                middle = (high + low) / 2 + shift * step
                first = low if not cut else middle - step * (_LEVELS / 2)
                first = first.round().clamp(-128, _PROTECTIVE)
                candidates.append((step + (first + 128) * 256).to(torch.int32).to(torch.int16))
    return _least_error(scaled_EOGk, candidates, recipe, importance_EGk)


def round_to_grid(scaled: Tensor, group: Tensor | None, recipe: W4A8Recipe) -> Tensor:
    """The nearest nibbles, uint8 in 0..15, of weights divided by their channel's scale. `group` has
    the parameters of each weight, broadcast against `scaled`."""
    if group is None:
        code = scaled.round().clamp(-_MAGNITUDE, _MAGNITUDE)
    elif recipe is W4A8Recipe.FP8_G128:
        code = (scaled * torch.exp2(-group.float())).round().clamp(-_MAGNITUDE, _MAGNITUDE)
    else:
        step, offset = (group & 255).float(), ((group >> 8) & 255).float()
        # A weight that calibration moved out of its group's range must not leave 8 bits.
        highest = ((255 - offset) / step).floor().clamp_max(_LEVELS)
        nibble = (scaled + (128 - offset)).div_(step).round_()
        return torch.minimum(nibble, highest, out=nibble).clamp_min_(0).to(torch.uint8)
    if recipe is W4A8Recipe.INT8_CHANNEL:
        return (code.to(torch.int8) & 15).to(torch.uint8)
    return (code.abs() + 8 * (code < 0)).to(torch.uint8)


def quantize_w4a8(weight: Tensor, recipe: W4A8Recipe) -> PackedW4A8:
    """Rounds weights [O, K] or [E, O, K] to the nearest codes: on a GPU in one kernel where the
    recipe has groups, else a piece at a time, so that a CPU works in its caches and a GPU needs
    little memory beside the weights."""
    weight_EOK = weight.view(-1, *weight.shape[-2:])
    if weight.is_cuda and recipe.group is not None:
        return pack_nearest(weight_EOK.contiguous(), recipe)
    experts, outputs, inputs = weight_EOK.shape
    rows = max(1, _PIECE[weight.device.type == "cpu"] // inputs)
    whole = torch.split(weight_EOK.flatten(0, 1), rows)
    pieces = [_round_rows(piece, recipe) for piece in whole]
    nibbles, scales, groups = (
        torch.cat(parts).view(experts, outputs, -1) for parts in zip(*pieces, strict=True)
    )
    return PackedW4A8(
        recipe,
        inputs,
        pack_nibbles(nibbles, recipe),
        scales.squeeze(-1),
        None if recipe.group is None else groups.transpose(1, 2).contiguous(),
    )


def _round_rows(weight_OK: Tensor, recipe: W4A8Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Nibbles [O, padded K], scales [O] and parameters of groups [O, G] (none: [O, 0]) of rows."""
    weight_EOK = weight_OK[None].float()
    scale_EO = fit_channels(weight_EOK, recipe)
    padding = padded(weight_OK.shape[1]) - weight_OK.shape[1]
    scaled = F.pad(weight_EOK / scale_EO[..., None], (0, padding))
    if recipe.group is None:
        nibbles = round_to_grid(scaled, None, recipe)
        return nibbles[0], scale_EO[0], nibbles[0, :, :0]
    scaled_EOGk = torch.unflatten(scaled, -1, (-1, recipe.group))
    group_EOG = fit_groups(scaled_EOGk, recipe)
    assert group_EOG is not None
    nibbles = round_to_grid(scaled_EOGk, group_EOG[..., None], recipe).flatten(-2)
    return nibbles[0], scale_EO[0], group_EOG[0]


def _least_error(
    scaled_EOGk: Tensor,
    candidates: Sequence[Tensor],
    recipe: W4A8Recipe,
    importance_EGk: Tensor | None,
) -> Tensor:
    """For each group the candidate [E, O, G] that rounds it best. Errors are summed in float64, so
    that the choice does not depend on the order that a device sums in."""
    best, least = candidates[0], None
    for candidate in candidates:
        error = (_rounded(scaled_EOGk, candidate, recipe) - scaled_EOGk).square_()
        if importance_EGk is not None:
            error *= importance_EGk[:, None]
        lost = error.sum(-1, dtype=torch.float64)
        if least is not None:
            candidate = torch.where(lost < least, candidate, best)
            lost = torch.minimum(lost, least)
        best, least = candidate, lost
    return best


def _rounded(scaled_EOGk: Tensor, group_EOG: Tensor, recipe: W4A8Recipe) -> Tensor:
    """The codes that weights are rounded to."""
    group_EOG1 = group_EOG[..., None]
    return decode_with(round_to_grid(scaled_EOGk, group_EOG1, recipe), group_EOG1, recipe)
