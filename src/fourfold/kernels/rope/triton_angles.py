"""Angles of the rotary embedding in Triton: a step's, once for all of its layers.

Shapes: T tokens, C head width.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fourfold.kernels.dependent_launch import overlaps_launches

_ELEMENTS = 128


@triton.jit(do_not_specialize=["tokens"])
def _angles_kernel(
    position_ptr,
    frequency_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, CHANNELS)
    inside = (token < tokens)[:, None] & (channel < HALF)[None, :]
    position = tl.load(position_ptr + token, mask=token < tokens, other=0).to(tl.float32)
    frequency = tl.load(frequency_ptr + channel, mask=channel < HALF, other=0.0)
    angle = position[:, None] * frequency[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    place = token.to(tl.int64)[:, None] * (2 * HALF) + channel[None, :]
    tl.store(cos_ptr + place, cos.to(cos_ptr.dtype.element_ty), mask=inside)
    tl.store(cos_ptr + place + HALF, cos.to(cos_ptr.dtype.element_ty), mask=inside)
    tl.store(sin_ptr + place, (-sin).to(sin_ptr.dtype.element_ty), mask=inside)
    tl.store(sin_ptr + place + HALF, sin.to(sin_ptr.dtype.element_ty), mask=inside)


def launch_angles(
    positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`rope_angles` on checked arguments."""
    tokens, half = len(positions_T), len(frequencies)
    cos_TC, sin_TC = (
        torch.empty(tokens, 2 * half, dtype=dtype, device=positions_T.device) for _ in range(2)
    )
    if tokens > 0:
        channels = triton.next_power_of_2(half)
        together = max(1, _ELEMENTS // channels)
        early = overlaps_launches(positions_T.device)
        _angles_kernel[(triton.cdiv(tokens, together),)](
            positions_T,
            frequencies,
            cos_TC,
            sin_TC,
            tokens,
            HALF=half,
            TOKENS=together,
            CHANNELS=channels,
            EARLY=early,
            launch_pdl=early,
        )
    return cos_TC, sin_TC
