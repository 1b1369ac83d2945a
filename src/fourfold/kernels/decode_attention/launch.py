"""Launching the tasks of a plan: a kernel for each tile.

Shapes: as in `attend`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fourfold.kernels.decode_attention.buffers import PlanBuffers
from fourfold.kernels.decode_attention.choose import Build, choose_build
from fourfold.kernels.decode_attention.plan import TASK_FIELDS
from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.pages.layout import PAGE_TOKENS, PageCodes, PageLayout, scales_fetched

_LOG2_E = math.log2(math.e)


def launch_tasks(
    q_RHC: Tensor,
    records: Tensor,
    open_k: Tensor,
    open_v: Tensor,
    layout: PageLayout,
    plan: PlanBuffers,
    scale: float,
) -> Tensor:
    """Launches the tasks of each tile in the order of the capacity; rows in one piece are written
    to the output, the others to the plan's partial results."""
    shape = plan.shape
    out_RHC = torch.empty_like(q_RHC)
    early = overlaps_launches(q_RHC.device)
    # GPUs that start nothing early would read nothing ahead by it.
    few = (early or not q_RHC.is_cuda) and plan.capacity.are_few(shape.kv_heads)
    hopper = _is_hopper(q_RHC.device)
    place = 0
    for i, (tile, count) in enumerate(plan.capacity.tasks):
        build = choose_build(tile, shape.head_width, few=few, hopper=hopper)
        rest = (
            out_RHC, plan.partial_o.view(q_RHC.dtype), plan.partial_lse, plan["header"],
            plan["tasks"][place:], plan["rows"], plan["pages"], scale * _LOG2_E,
        )  # fmt: skip
        arguments = (records, open_k, open_v, layout)
        if build.gluon:
            kernel, pages, constants = _gluon(*arguments)
        else:
            kernel, pages, constants = _triton(*arguments, tile, shape.rows, build)
        kernel[(count * shape.kv_heads,)](
            q_RHC, *pages, *rest, **constants, G=shape.kv_heads, SHARED=shape.shared,
            C=shape.head_width, STAGES=build.stages, EARLY=early, INDEX=i, num_warps=build.warps,
            maxnreg=build.registers, launch_pdl=early,
        )  # fmt: skip
        place += count * TASK_FIELDS
    return out_RHC


def _gluon(
    records: Tensor, open_k: Tensor, open_v: Tensor, layout: PageLayout
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel for wide tiles on Hopper, how it is handed pages, and its own constants."""
    from triton.experimental.gluon import language as gl

    from fourfold.kernels.decode_attention.gluon_sm90 import wide_kernel
    from fourfold.kernels.pages.gluon_pages import descriptor, page_descriptors

    half = gl.bfloat16 if open_k.dtype is torch.bfloat16 else gl.float16
    opened = (
        descriptor(tokens.flatten(1), [PAGE_TOKENS, layout.head_width], half)
        for tokens in (open_k, open_v)
    )
    constants = {
        "SCALES": scales_fetched(layout.kv_heads),
        "INT8": layout.codes is PageCodes.INT8,
    }
    return wide_kernel, (*page_descriptors(records, layout), *opened), constants


def _triton(
    records: Tensor,
    open_k: Tensor,
    open_v: Tensor,
    layout: PageLayout,
    tile: int,
    new: int,
    build: Build,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The same of the kernel for all other tiles. `new`: rows of a sequence."""
    from fourfold.kernels.decode_attention.triton_decode import decode_kernel

    codes, scales = records.view(layout.codes.dtype), records.view(torch.float32)
    constants = {
        "RECORD": layout.record_bytes,
        "NEW": new,
        "M": tile,
        "FP8": layout.codes is PageCodes.FP8,
        "T": build.open_tokens,
        "FEW": build.few,
    }
    return decode_kernel, (codes, scales, open_k, open_v), constants


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
