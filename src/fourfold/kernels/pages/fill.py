"""The verb that fills pages: checked, then Triton on a GPU and the reference anywhere else.

A negative page or place means that there is nothing to do, so that a list of jobs of fixed length
can be part of a CUDA graph.

Shapes: P pages, R bytes of a record, S rows of 16-bit keys and values, J jobs, G KV heads, N = 64
tokens per page, C head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.kernels.pages import reference
from fourfold.kernels.pages.layout import PageLayout


class SealJobs(NamedTuple):
    """Pages that are to be sealed; the arguments of `seal_pages`."""

    records_PR: Tensor
    layout: PageLayout
    k_SGC: Tensor
    v_SGC: Tensor
    first_row_J: Tensor
    page_J: Tensor

    def check(self) -> None:
        """Whether shapes and dtypes agree."""
        layout = self.layout
        assert self.records_PR.dtype == torch.uint8
        assert self.records_PR.shape[1:] == (layout.record_bytes,), "records of another layout"
        assert self.records_PR.stride(1) == 1
        assert self.k_SGC.shape == self.v_SGC.shape
        assert self.k_SGC.dtype == self.v_SGC.dtype
        for rows in (self.k_SGC, self.v_SGC):
            assert rows.stride()[1:] == (rows.shape[2], 1), "the heads of a row must be contiguous"
        assert self.first_row_J.shape == self.page_J.shape == (self.page_J.numel(),)
        for job in (self.first_row_J, self.page_J):
            assert job.dtype in (torch.int32, torch.int64), "rows and pages are integers"
            assert job.stride() == (1,), "jobs must be contiguous"
        shape = (layout.kv_heads, layout.head_width)
        assert self.k_SGC.shape[1:] == shape, "rows of another layout"


def seal_pages(
    records_PR: Tensor,
    layout: PageLayout,
    k_SGC: Tensor,
    v_SGC: Tensor,
    first_row_J: Tensor,
    page_J: Tensor,
) -> None:
    """Writes, for each job, 64 rows of keys and values as the record of a page.

    Job j takes the rows `first_row_J[j]`.. of `k_SGC` and `v_SGC` (16 bits or float32, [S, G, C]
    with contiguous channels and any row stride: open pages, or a chunk's own keys and values) and
    fills record `page_J[j]` of `records_PR`, uint8 [P, R]. Each KV head has one scale for its keys
    and one for its values: the largest magnitude of the 64 rows becomes 127 or 448. `first_row_J`
    and `page_J` are int32 or int64 on the same device; no two jobs may have the same page. Padding
    bytes are left as they are. No host synchronisation.
    """
    jobs = SealJobs(records_PR, layout, k_SGC, v_SGC, first_row_J, page_J)
    jobs.check()
    if not records_PR.is_cuda:
        reference.seal_pages(*jobs)
        return
    from fourfold.kernels.pages.triton_pages import launch_seal

    launch_seal(*jobs)
