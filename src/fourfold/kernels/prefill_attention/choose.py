"""Which kernel attends, from the shape and the hardware: pure, no trials at start-up.

Shapes: H query heads, G KV heads, C head width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from fourfold.kernels.pages.layout import PAGE_TOKENS, PageCodes, PageLayout, scales_fetched

Backend = Literal["reference", "triton", "gluon"]
_SHARED_BYTES_SM90 = 227 * 1024
_BARRIER_BYTES = 1024
_MOST_STAGES = 8
_MOST_GROUP = 64


@dataclasses.dataclass(frozen=True)
class PrefillChoice:
    """How a step's attention is launched."""

    backend: Backend
    stages: int = 1
    """Pages in flight from memory."""
    num_warps: int = 4


def choose_prefill(
    layout: PageLayout, heads: int, capability: tuple[int, int] | None
) -> PrefillChoice:
    """The choice for 16-bit q, k, v on a GPU of a compute capability, None for a CPU."""
    group = heads // layout.kv_heads
    fits = layout.head_width in (64, 128) and group <= _MOST_GROUP
    if capability is None or not fits or capability < _needed(layout.codes):
        return PrefillChoice("reference")
    if capability == (9, 0):
        return PrefillChoice("gluon", stages=_stages_sm90(layout))
    return PrefillChoice("triton", stages=3)


def _needed(codes: PageCodes) -> tuple[int, int]:
    return (8, 0) if codes is PageCodes.INT8 else (8, 9)


def _stages_sm90(layout: PageLayout) -> int:
    """A power of two, beside the own pages of two subtiles in 16 bits."""
    own = 2 * 2 * PAGE_TOKENS * layout.head_width * 2
    stage = 2 * PAGE_TOKENS * layout.head_width + 4 * scales_fetched(layout.kv_heads)
    fitting = (_SHARED_BYTES_SM90 - _BARRIER_BYTES - own) // stage
    return min(_MOST_STAGES, 1 << (int(fitting).bit_length() - 1))
