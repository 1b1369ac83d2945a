"""Pages in the form of a receiver that keeps them otherwise: copies, converted by the sender.

What an 8-bit page has lost stays lost.

Shapes: P pages, N tokens per page, T tokens, G KV heads, C head width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.engine.handover.pages import Prompt, is_coded, side_stream, view
from fourfold.kernels.pages import seal_pages
from fourfold.kernels.pages.layout import PAGE_TOKENS, VALUE_ORDER, PageCodes, PageLayout
from fourfold.quadrants.kv_pages import CodedPages, KVPages
from fourfold.transport.format import PageFormat

logger = logging.getLogger(__name__)

_CODES = {codes.value: codes for codes in PageCodes}


def tell_of_conversion(peer: str, mine: PageFormat, theirs: PageFormat) -> None:
    """Warns of what it costs that a peer keeps pages otherwise."""
    logger.warning(
        "pages to %s are converted from %s to %s and sent over TCP, which takes time; start both "
        "workers with the same --kv-pages",
        peer,
        mine.code,
        theirs.code,
    )


class ConvertedPages:
    """An engine's pages as records and rows of another format; an `Outlet`."""

    def __init__(self, pages: KVPages, theirs: PageFormat) -> None:
        self._pages = pages
        self._stream = side_stream(pages)
        self.record_bytes = 2 * PAGE_TOKENS * theirs.kv_heads * theirs.head_width * 4  # as float32
        self._dtype: torch.dtype = getattr(torch, theirs.open_code)
        self._layout: PageLayout | None = None
        if is_coded(theirs):
            self._layout = PageLayout(
                kv_heads=theirs.kv_heads, head_width=theirs.head_width, codes=_CODES[theirs.code]
            )

    def records(
        self, layers: Sequence[int], prompt: Prompt, first: int, count: int
    ) -> list[list[memoryview]]:
        return [[view(self._records(layer, prompt, first, count))] for layer in layers]

    def rows(self, layers: Sequence[int], prompt: Prompt) -> list[list[memoryview]]:
        first, end = prompt.tokens // PAGE_TOKENS, prompt.tokens
        return [
            [view(x_TGC) for x_TGC in self._read(layer, prompt, first, end).to(self._dtype)]
            for layer in layers
        ]

    def _records(self, layer: int, prompt: Prompt, first: int, count: int) -> Tensor:
        end = min((first + count) * PAGE_TOKENS, prompt.tokens)
        kv_2TGC = self._read(layer, prompt, first, end)
        if self._layout is None:
            kv_2TGC = F.pad(kv_2TGC, (0, 0, 0, 0, 0, count * PAGE_TOKENS - kv_2TGC.shape[1]))
            kv_2PNGC = torch.unflatten(kv_2TGC, 1, (count, PAGE_TOKENS))
            return kv_2PNGC.permute(1, 0, 3, 2, 4).to(self._dtype).contiguous()
        records_PB = torch.zeros(count, self._layout.record_bytes, dtype=torch.uint8)
        pages = torch.arange(count)
        k_TGC, v_TGC = kv_2TGC.contiguous()
        seal_pages(records_PB, self._layout, k_TGC, v_TGC, pages * PAGE_TOKENS, pages)
        return records_PB

    def _read(self, layer: int, prompt: Prompt, first: int, end: int) -> Tensor:
        """Keys and values from page `first` to token `end`, float32 [2, T, G, C] on a CPU."""
        with torch.cuda.stream(self._stream):
            return self._fetched(layer, prompt, first, end)

    def _fetched(self, layer: int, prompt: Prompt, first: int, end: int) -> Tensor:
        start = first * PAGE_TOKENS
        pages = self._pages
        if isinstance(pages, CodedPages):
            full = end // PAGE_TOKENS
            kv_2TGC = _decoded(pages, layer, prompt.pages[first:full])
            open_row = prompt.slot * PAGE_TOKENS
            rows_2TGC = pages.open[layer, :, open_row : open_row + end - full * PAGE_TOKENS]
            return torch.cat((kv_2TGC, rows_2TGC.float().cpu()), 1)
        last = -(-end // PAGE_TOKENS)
        kv_P2GNC = pages.data[layer, prompt.pages[first:last]].cpu().float()
        return kv_P2GNC.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : end - start]


def _decoded(pages: CodedPages, layer: int, ids: list[int]) -> Tensor:
    """What the codes of pages stand for, float32 [2, T, G, C] on a CPU."""
    views = pages.layout.views(pages.records[layer, ids].cpu())
    keys_PGNC = views.keys.float() * views.scales[:, 0, :, None, None]
    values_PGCN = views.values.float() * views.scales[:, 1, :, None, None]
    values_PGNC = torch.empty_like(keys_PGNC)
    values_PGNC[:, :, list(VALUE_ORDER)] = values_PGCN.transpose(2, 3)
    return torch.stack((keys_PGNC, values_PGNC)).transpose(2, 3).flatten(1, 2)
