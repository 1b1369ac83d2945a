"""Filling pages, in plain PyTorch: what the CPU computes and what the Triton kernels must equal.

Codes come from one multiplication by `largest / amax`, rounded half to even, scales from one by
`1 / largest`; in the kernels too: the same bits.

Shapes: P pages, R bytes of a record, S rows of 16-bit keys and values, J jobs, G KV heads, N = 64
tokens per page, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.pages.layout import PAGE_TOKENS, VALUE_ORDER, PageLayout

SMALLEST = 1e-30
"""What takes the place of the largest magnitude of a page of zeros."""


def seal_pages(
    records_PR: Tensor,
    layout: PageLayout,
    k_SGC: Tensor,
    v_SGC: Tensor,
    first_row_J: Tensor,
    page_J: Tensor,
) -> None:
    """Writes pages of 64 rows as records; see `fourfold.kernels.pages`."""
    wanted = page_J >= 0
    pages = page_J[wanted].long()
    rows_JN = first_row_J[wanted].long()[:, None] + torch.arange(PAGE_TOKENS, device=page_J.device)
    keys, key_scale_JG = _quantized(k_SGC[rows_JN], layout)
    values, value_scale_JG = _quantized(v_SGC[rows_JN], layout)
    order = torch.tensor(VALUE_ORDER, device=page_J.device)
    views = layout.views(records_PR)
    # Copied as bytes: not every device indexes float8.
    views.keys.view(torch.uint8)[pages] = keys.transpose(1, 2).view(torch.uint8)
    values = values.view(torch.uint8)[:, order].permute(0, 2, 3, 1)
    views.values.view(torch.uint8)[pages] = values
    views.scales[pages] = torch.stack((key_scale_JG, value_scale_JG), 1)


def _quantized(x_JNGC: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Codes of the same shape and scales [J, G]."""
    largest = layout.codes.largest
    x_JNGC = x_JNGC.float()
    amax_JG = x_JNGC.abs().amax((1, 3)).clamp_min(SMALLEST)
    # `largest / amax_JG` and, on a GPU, `amax_JG / largest` would be products with reciprocals.
    codes = x_JNGC * torch.full_like(amax_JG, largest).div_(amax_JG)[:, None, :, None]
    if layout.codes.dtype == torch.int8:
        codes = codes.round_()
    return codes.to(layout.codes.dtype), amax_JG * (1 / largest)
