"""The verb: check, choose, launch.

Shapes: T rows, H query heads, G KV heads, C head width, P pages.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fourfold.kernels.pages.layout import PAGE_TOKENS, PageCodes, PageLayout, scales_fetched
from fourfold.kernels.prefill_attention.batch import SUBTILES, PrefillBatch
from fourfold.kernels.prefill_attention.choose import PrefillChoice, choose_prefill
from fourfold.kernels.prefill_attention.reference import prefill_reference

_LOG2_E = math.log2(math.e)


def paged_int8_attention_prefill(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    records: Tensor,
    layout: PageLayout,
    batch: PrefillBatch,
    *,
    scale: float | None = None,
    out_THC: Tensor | None = None,
) -> Tensor:
    """Causal attention of every chunk's rows over the sequence's sealed pages and the own page.

    q [T, H, C], k and v [T, G, C] in 16 bits (a CPU takes float32 too), rows may be strided;
    `records` uint8 [P, record_bytes] of one layer, in which every page of the batch's table is
    sealed; `scale` is C ** -0.5 unless given. A row attends to the pages before its own in 8 bits
    and to its own page, up to itself, in 16. Returns [T, H, C] in q's dtype, `out_THC` if that is
    given (contiguous); rows that belong to no chunk are arbitrary. No host synchronisation; the
    same inputs give the same bits.
    """
    _check(q_THC, k_TGC, v_TGC, records, layout, batch)
    scale = layout.head_width**-0.5 if scale is None else scale
    choice = choose_prefill(layout, batch.heads, _capability(q_THC.device))
    if out_THC is not None:
        assert out_THC.shape == q_THC.shape
        assert out_THC.is_contiguous()
    arguments = (q_THC, k_TGC, v_TGC, records, layout, batch)
    return launch_prefill(choice, *arguments, scale=scale, out_THC=out_THC)


def launch_prefill(
    choice: PrefillChoice,
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    records: Tensor,
    layout: PageLayout,
    batch: PrefillBatch,
    *,
    scale: float,
    out_THC: Tensor | None = None,
) -> Tensor:
    """As `paged_int8_attention_prefill`, by a given choice."""
    if out_THC is None:
        out_THC = torch.empty(q_THC.shape, dtype=q_THC.dtype, device=q_THC.device)
    if choice.backend == "reference":
        return out_THC.copy_(
            prefill_reference(q_THC, k_TGC, v_TGC, records, layout, batch, scale=scale)
        )
    launch = _launch_gluon if choice.backend == "gluon" else _launch_triton
    launch(choice, q_THC, k_TGC, v_TGC, records, layout, batch, scale * _LOG2_E, out_THC)
    return out_THC


def _check(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    records: Tensor,
    layout: PageLayout,
    batch: PrefillBatch,
) -> None:
    assert q_THC.shape[1:] == (batch.heads, layout.head_width), q_THC.shape
    assert batch.kv_heads == layout.kv_heads
    for x in (k_TGC, v_TGC):
        assert x.shape == (len(q_THC), layout.kv_heads, layout.head_width), x.shape
        assert x.dtype is q_THC.dtype
    for x in (q_THC, k_TGC, v_TGC):
        assert x.stride()[1:] == (layout.head_width, 1), "heads of a row lie side by side"
        assert x.device.type == "cpu" or x.element_size() == 2, x.dtype
    assert len(q_THC) * q_THC.stride(0) < 1 << 31, "queries beyond offsets of 32 bits"
    assert records.dtype is torch.uint8
    assert records.is_contiguous()
    assert records.shape[1:] == (layout.record_bytes,), records.shape


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _launch_gluon(
    choice: PrefillChoice,
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    records: Tensor,
    layout: PageLayout,
    batch: PrefillBatch,
    scale_log2: float,
    out_THC: Tensor,
) -> None:
    from triton.experimental.gluon import language as gl

    from fourfold.kernels.pages.gluon_pages import descriptor, page_descriptors
    from fourfold.kernels.prefill_attention.gluon_sm90 import prefill_kernel

    half = gl.bfloat16 if q_THC.dtype is torch.bfloat16 else gl.float16
    own = [PAGE_TOKENS, layout.head_width]
    prefill_kernel[(len(batch.tiles_W2) * layout.kv_heads,)](
        q_THC,
        out_THC,
        *page_descriptors(records, layout),
        descriptor(k_TGC.flatten(1), own, half),
        descriptor(v_TGC.flatten(1), own, half),
        batch.tiles_W2,
        batch.starts_B,
        batch.lengths_B,
        batch.prefix_pages_B,
        batch.table_BM,
        batch.table_BM.shape[1],
        q_THC.stride(0),
        scale_log2,
        STAGES=choice.stages,
        SCALES=scales_fetched(layout.kv_heads),
        C=layout.head_width,
        H=batch.heads,
        G=layout.kv_heads,
        HEADS=batch.padded_group,
        INT8=layout.codes is PageCodes.INT8,
        num_warps=choice.num_warps,
        maxnreg=168,
    )


def _launch_triton(
    choice: PrefillChoice,
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    records: Tensor,
    layout: PageLayout,
    batch: PrefillBatch,
    scale_log2: float,
    out_THC: Tensor,
) -> None:
    from fourfold.kernels.prefill_attention.triton_prefill import prefill_kernel

    prefill_kernel[(len(batch.tiles_W2) * SUBTILES * layout.kv_heads,)](
        q_THC,
        k_TGC,
        v_TGC,
        out_THC,
        records.view(layout.codes.dtype),
        records.view(torch.float32),
        batch.tiles_W2,
        batch.starts_B,
        batch.lengths_B,
        batch.prefix_pages_B,
        batch.table_BM,
        batch.table_BM.shape[1],
        q_THC.stride(0),
        k_TGC.stride(0),
        v_TGC.stride(0),
        scale_log2,
        RECORD=layout.record_bytes,
        STAGES=choice.stages,
        C=layout.head_width,
        H=batch.heads,
        G=layout.kv_heads,
        HEADS=batch.padded_group,
        SUBTILES=SUBTILES,
        INT8=layout.codes is PageCodes.INT8,
        num_warps=choice.num_warps,
    )
