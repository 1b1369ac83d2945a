"""The verb: from weights on a GPU to packed codes.

Its plain form is `quantize.w4a8.quantize_w4a8`, which does the same with PyTorch on any device; the
kernel computes every number as that does, so that both give the same bits. Recipes without groups
are left to it: they search a scale for whole rows, and nothing is served in them by default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.w4a8_gemm.packing import BLOCK, HALF, PackedW4A8, W4A8Recipe, padded


def pack_nearest(weight_EOK: Tensor, recipe: W4A8Recipe) -> PackedW4A8:
    """The nearest codes of weights [E, O, K], contiguous, of any float dtype.

    The recipe must have groups. Never waits for the device.
    """
    assert recipe.group is not None, recipe
    assert weight_EOK.is_contiguous(), weight_EOK.stride()
    experts, outputs, inputs = weight_EOK.shape
    blocks, groups = padded(inputs) // BLOCK, padded(inputs) // recipe.group
    fp8 = recipe is W4A8Recipe.FP8_G128
    packed = PackedW4A8(
        recipe,
        inputs,
        weight_EOK.new_empty(experts, blocks, outputs, HALF, dtype=torch.uint8),
        weight_EOK.new_empty(experts, outputs, dtype=torch.float32),
        weight_EOK.new_empty(experts, groups, outputs, dtype=torch.uint8 if fp8 else torch.int16),
    )
    from fourfold.kernels.w4a8_pack.triton_pack import launch

    launch(weight_EOK, packed)
    return packed
