"""The verb: decode attention over 8-bit pages as a plan says.

Shapes: R query rows, H query heads, G KV heads, C head width, P pages, S sequence slots, N = 64
tokens per page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.decode_attention.buffers import PlanBuffers
from fourfold.kernels.pages.layout import PAGE_TOKENS, PageLayout


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
    from the same plan.
    """
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
    scale = shape.head_width**-0.5 if scale is None else scale
    from fourfold.kernels.decode_attention.triton_decode import launch

    return launch(q_RHC, records, open_k, open_v, layout, plan, scale)
