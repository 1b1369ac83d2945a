"""Choosing 4-bit codes so that a weight's product changes least on the inputs it meets (GPTQ).

Rounding every weight to its nearest code makes the smallest error in the weights; this makes a
smaller one in `x @ weight.T`. Channels are rounded one after the other, and what rounding one costs
is made good in those that follow, as far as inputs of the calibration are correlated with it
(Frantar et al. 2022). Groups are fitted when their turn comes, to the weights as moved by then.

Shapes: E experts (1 for a dense weight), O output channels, K input channels, N calibration rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import (
    PackedW4A8,
    W4A8Recipe,
    decode_with,
    pack_nibbles,
    padded,
)
from fourfold.quantize.w4a8 import fit_channels, fit_groups, round_to_grid

_BLOCK = 128
_DAMPING = 0.01
_RETRIES = 6


def gptq(weight: Tensor, hessian: Tensor, recipe: W4A8Recipe) -> PackedW4A8:
    """Codes for a floating-point weight [O, K] or [E, O, K].

    `hessian` [K, K] or [E, K, K] is the sum of x x^T over the inputs of calibration, up to a factor
    of each expert's own; one of zeros means that an expert saw none and is rounded to nearest.
    Computed on the weight's device in float32, factors in float64.
    """
    weight_EOK = weight.view(-1, *weight.shape[-2:]).float()
    hessian_EKK = hessian.view(-1, *hessian.shape[-2:])
    experts, outputs, inputs = weight_EOK.shape
    assert hessian_EKK.shape == (experts, inputs, inputs)
    importance_EK = hessian_EKK.diagonal(dim1=-2, dim2=-1).float()
    mean_E1 = importance_EK.mean(-1, keepdim=True)
    unseen = torch.where(mean_E1 > 0, mean_E1, 1.0)
    importance_EK = torch.where(importance_EK > 0, importance_EK, unseen)
    scale_EO = fit_channels(weight_EOK, recipe, importance_EK)
    width = padded(inputs)
    left_EKO = weight_EOK.new_zeros(experts, width, outputs)
    left_EKO[:, :inputs] = (weight_EOK / scale_EO[..., None]).transpose(1, 2)
    seen_EK = weight_EOK.new_zeros(experts, width)
    seen_EK[:, :inputs] = importance_EK
    factor_EKK = inverse_factor(hessian_EKK)
    nibbles_EKO = torch.empty(left_EKO.shape, dtype=torch.uint8, device=weight.device)
    groups = []
    for start in range(0, width, _BLOCK):
        stop, known = start + _BLOCK, min(start + _BLOCK, inputs)
        error_EkO = left_EKO.new_zeros(experts, known - start, outputs)
        group_EO = None
        for channel in range(start, stop):
            if recipe.group is not None and channel % recipe.group == 0:
                span = slice(channel, channel + recipe.group)
                scaled_EO1k = left_EKO[:, span].transpose(1, 2)[:, :, None].contiguous()
                group_EOG = fit_groups(scaled_EO1k, recipe, seen_EK[:, None, span])
                assert group_EOG is not None
                groups.append(group_EOG)
                group_EO = group_EOG[..., 0]
            nibbles_EO = round_to_grid(left_EKO[:, channel], group_EO, recipe)
            nibbles_EKO[:, channel] = nibbles_EO
            if channel >= known:
                continue
            row_Ek = factor_EKK[:, channel, channel:known]
            code_EO = decode_with(nibbles_EO, group_EO, recipe)
            error_EO = (left_EKO[:, channel] - code_EO) / row_Ek[:, :1]
            left_EKO[:, channel:known] -= row_Ek[..., None] * error_EO[:, None]
            error_EkO[:, channel - start] = error_EO
        if known < inputs:
            rest_EKk = factor_EKK[:, start:known, known:].transpose(1, 2)
            left_EKO[:, known:inputs].baddbmm_(rest_EKk, error_EkO, alpha=-1)
    group_EGO = torch.cat(groups, -1).transpose(1, 2).contiguous() if groups else None
    nibbles_EOK = nibbles_EKO.transpose(1, 2).contiguous()
    return PackedW4A8(recipe, inputs, pack_nibbles(nibbles_EOK, recipe), scale_EO, group_EGO)


def inverse_factor(hessian_EKK: Tensor) -> Tensor:
    """The upper triangular U with U^T U = inverse of the damped Hessian, float32 [E, K, K].

    Channels that no input used get the mean of the others; an expert that saw nothing at all gets
    the identity, by which nothing is fed back. Damping grows where a matrix stays indefinite.
    """
    whole = hessian_EKK.double()
    diagonal = whole.diagonal(dim1=-2, dim2=-1)
    used = diagonal > 0
    mean_E1 = diagonal.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1)
    mean_E1 = torch.where(mean_E1 > 0, mean_E1, 1.0)
    whole = whole / mean_E1[..., None] + torch.diag_embed((~used).double())
    eye = torch.eye(whole.shape[-1], dtype=whole.dtype, device=whole.device)
    damping = torch.full_like(mean_E1, _DAMPING)[..., None]
    for _ in range(_RETRIES):
        lower, failed = torch.linalg.cholesky_ex(whole + damping * eye)
        if not bool(failed.any()):
            break
        damping = torch.where(failed[:, None, None] > 0, damping * 10, damping)
    inverse = torch.cholesky_inverse(lower)
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor
