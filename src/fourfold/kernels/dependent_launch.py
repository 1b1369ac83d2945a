"""Kernels that start before the one in front of them has ended (programmatic dependent launch).

A kernel launched so begins as soon as every program of the kernel before it has said
`gdc_launch_dependents` or ended, and sees what that kernel wrote after its own `gdc_wait`. All
kernels of such a chain wait, so each has seen all before it. What the host copied to the device
before the first of a chain may be read without waiting, and so may weights.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel can start before the one it follows has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
