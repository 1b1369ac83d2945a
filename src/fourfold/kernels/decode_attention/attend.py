"""The verbs: decode attention over 8-bit pages as a plan says, and its rows coded for a product.

Shapes: R query rows, H query heads, G KV heads, C head width, P pages, S sequence slots, N = 64
tokens per page, T rows of a step, W channels of coded rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.decode_attention.buffers import PlanBuffers
from fourfold.kernels.pages.fill import SealJobs
from fourfold.kernels.pages.layout import PAGE_TOKENS, PageLayout
from fourfold.kernels.rows.quantize import WIDEST
from fourfold.kernels.rows.reference import Rows


def paged_int8_attention_decode(
    q_RHC: Tensor,
    records: Tensor,
    open_k: Tensor,
    open_v: Tensor,
    layout: PageLayout,
    plan: PlanBuffers,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of the new rows of decoding sequences; [R, H, C] in the dtype of `q_RHC`.

    `q_RHC` bfloat16 or float16, contiguous; `records` uint8 [P, record_bytes] sealed pages of one
    layer, INT8 (the recipe of the name) or FP8; `open_k` and `open_v` [S * 64, G, C] in the dtype
    of `q_RHC`, slot s owning rows s * 64 .., new rows included. `scale` is C**-0.5 unless given.
    Rows that the plan does not have are left undefined. Never waits for the device; the same bits
    from the same plan. The kernel that was enqueued last may make queries and the new rows' keys
    and values; sealed pages and earlier open rows are read before it has ended, so they must not
    come from it if it lets others start early.
    """
    out_RHC = paged_int8_attention_decode_unmerged(
        q_RHC, records, open_k, open_v, layout, plan, scale=scale
    )
    if plan.capacity.merges:
        from fourfold.kernels.decode_attention.triton_merge import launch_merge

        launch_merge(out_RHC, plan)
    return out_RHC


def paged_int8_attention_decode_unmerged(
    q_RHC: Tensor,
    records: Tensor,
    open_k: Tensor,
    open_v: Tensor,
    layout: PageLayout,
    plan: PlanBuffers,
    *,
    scale: float | None = None,
) -> Tensor:
    """The same without its last part: rows that the plan cuts into pieces are left undefined, their
    partial results in the plan's buffers, for `merge_and_quantize`."""
    shape = plan.shape
    rows = len(q_RHC)
    assert q_RHC.shape == (rows, shape.heads, shape.head_width)
    assert q_RHC.is_contiguous()
    assert q_RHC.dtype in (torch.bfloat16, torch.float16)
    assert rows <= plan.capacity.rows
    assert (layout.kv_heads, layout.head_width) == (shape.kv_heads, shape.head_width)
    assert shape.head_width in (64, 128)
    assert records.dtype == torch.uint8
    assert records.is_contiguous()
    assert records.shape[1:] == (layout.record_bytes,)
    for pages in (open_k, open_v):
        assert pages.dtype == q_RHC.dtype
        assert pages.is_contiguous()
        assert pages.shape[1:] == (shape.kv_heads, shape.head_width)
        assert len(pages) % PAGE_TOKENS == 0
        assert pages.numel() < 1 << 31, "open pages beyond offsets of 32 bits"
    scale = shape.head_width**-0.5 if scale is None else scale
    from fourfold.kernels.decode_attention.launch import launch_tasks

    return launch_tasks(q_RHC, records, open_k, open_v, layout, plan, scale)


def merge_and_quantize(
    out_THC: Tensor,
    plan: PlanBuffers | None,
    dtype: torch.dtype,
    width: int,
    seals: SealJobs | None = None,
) -> Rows:
    """Rows of attention as `rows.quantize_rows` codes them, [T, H * C] padded to `width`.

    The first rows of `out_THC` come from `paged_int8_attention_decode_unmerged`, whose last part is
    done here: their codes are those of the merged rows, which are not written. Rows beyond the
    plan's, without a plan all, are coded as they are. `dtype` is int8 or float8_e4m3fn. `seals` are
    done in the same launch; their list ends at the first negative page. No host synchronisation.
    """
    tokens, heads, head_width = out_THC.shape
    assert out_THC.is_contiguous()
    assert heads * head_width <= width <= WIDEST
    assert dtype in (torch.int8, torch.float8_e4m3fn), f"no 8-bit codes: {dtype}"
    if plan is not None:
        assert plan.capacity.rows <= tokens
        assert (plan.shape.heads, plan.shape.head_width) == (heads, head_width)
    if seals is not None:
        seals.check()
        assert seals.k_SGC.is_contiguous()
        assert seals.v_SGC.is_contiguous()
    from fourfold.kernels.decode_attention.triton_merge import launch_merge_quantize

    return launch_merge_quantize(out_THC, plan, dtype, width, seals)
