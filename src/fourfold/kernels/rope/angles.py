"""The verb: checked, then Triton on a GPU and the reference anywhere else.

Shapes: T tokens, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.rope import reference


def rope_angles(
    positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, C] of positions times frequencies, as `norm_rope` takes them.

    `positions_T` are integers [T], `frequencies` float32 [C / 2] in radians per position; both
    halves of C have the same angles, the sine's first half is negated. Computed in float32, rounded
    to `dtype`. No host synchronisation.
    """
    assert positions_T.ndim == 1, positions_T.shape
    assert frequencies.dtype == torch.float32, frequencies.dtype
    if not positions_T.is_cuda:
        return reference.rope_angles(positions_T, frequencies, dtype)
    from fourfold.kernels.rope.triton_angles import launch_angles

    return launch_angles(positions_T.contiguous(), frequencies.contiguous(), dtype)
