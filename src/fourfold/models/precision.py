"""The precisions a model can be served in.

Importing this needs no torch, so that a command line can list the choices.
"""

from __future__ import annotations

import enum


class Precision(enum.StrEnum):
    """Weights and activations. `AUTO` picks by device, see `models.loading.choose_precision`."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    W8A8 = "w8a8"
    """Int8 weights per channel, int8 activations per token, exact int32 sums."""
    W4A8 = "w4a8"
    """FFNs' weights in 4 bits, in groups of 64 that expand to int8; the rest as W8A8."""
    W4A8_FP8 = "w4a8-fp8"
    """The same with groups of 128, e4m3 and e4m3 activations; Hopper and Ada only."""

    @property
    def quantised(self) -> bool:
        """Whether weights are codes with scales."""
        return self in (Precision.W8A8, Precision.W4A8, Precision.W4A8_FP8)


class PageFormat(enum.StrEnum):
    """What keys and values are kept in. `AUTO`: INT8 on a GPU, where its kernels read heads like
    the model's and its keys have no biases that bfloat16 would keep; else FLOAT."""

    AUTO = "auto"
    FLOAT = "float"
    """16 bits where the device multiplies them natively, else 32."""
    INT8 = "int8"
    """Finished pages in int8 with a scale per page and KV head, the page being filled in FLOAT."""
    FP8 = "fp8"
    """As INT8, in e4m3; Hopper and Ada only."""
