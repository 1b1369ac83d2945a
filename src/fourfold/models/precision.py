"""The precisions a model can be served in, and which one suits a device.

Importing this needs no torch, so that a command line can list the choices.
"""

from __future__ import annotations

import enum


class Precision(enum.StrEnum):
    """Activations and weights. `AUTO` picks by device, see `models.loading.choose_precision`."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    W8A8 = "w8a8"
    """Int8 weights per channel, int8 activations per token, exact int32 sums; CPU only."""
