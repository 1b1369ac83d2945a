"""The memory that attention reads: keys and values of all layers, in pages of N tokens.

A page holds N consecutive tokens of one sequence in every layer. There are two kinds of memory:
`FloatPages` keep every page in floating point; `CodedPages` keep finished pages in 8 bits and the
page that each sequence is still filling (its open page) in floating point. Who may use which page
is decided elsewhere (`engine.page_pool`); these only store.

Shapes: L layers, P pages, S slots of sequences, G KV heads, N tokens per page, C head width,
T tokens of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fourfold.kernels.pages import append_rows, seal_pages
from fourfold.kernels.pages.layout import PAGE_TOKENS, PageCodes, PageLayout

__all__ = [
    "PAGE_TOKENS",
    "CodedPages",
    "FloatPages",
    "KVPages",
    "PageShape",
    "Span",
    "make_pages",
]


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens `start : start + length` of one sequence, whose KV lives in `pages` in order and, as
    far as its last page is not full, in the open page of its `slot`."""

    start: int
    length: int
    pages: Sequence[int]
    slot: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageShape:
    """What one page holds: keys and values of N tokens in every layer, of `dtype`, or in 8-bit
    `codes` once it is full."""

    layers: int
    kv_heads: int
    head_width: int
    dtype: torch.dtype
    codes: PageCodes | None = None

    @property
    def layout(self) -> PageLayout:
        """The record of a finished page of 8-bit codes."""
        assert self.codes is not None
        return PageLayout(kv_heads=self.kv_heads, head_width=self.head_width, codes=self.codes)

    @property
    def float_bytes(self) -> int:
        """Bytes of one page in floating point, all layers."""
        per_layer = 2 * self.kv_heads * PAGE_TOKENS * self.head_width
        return self.layers * per_layer * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one finished page, all layers."""
        if self.codes is None:
            return self.float_bytes
        return self.layers * self.layout.record_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes that each running sequence takes beside its pages: its open page."""
        return 0 if self.codes is None else self.float_bytes


class FloatPages:
    """Keys and values in one tensor `[L, P, 2, G, N, C]`, so a page of a layer is one piece."""

    chunk_multiple = 1
    """Chunks of a prompt may be cut after any token."""

    def __init__(self, shape: PageShape, pages: int, device: torch.device) -> None:
        size = (shape.layers, pages, 2, shape.kv_heads, PAGE_TOKENS, shape.head_width)
        self.shape = shape
        # Zeros, not garbage: masked positions of a fresh page are multiplied by zero, and a NaN
        # would survive that.
        self.data = _zeros(pages * shape.page_bytes, device).view(shape.dtype).view(size)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def writes(self, spans: Sequence[Span]) -> FloatWrites:
        """How a step whose rows are those of the spans, in order, stores them."""
        return FloatWrites(self, spans)

    def runs(self, pages: Tensor) -> Tensor:
        """Names the runs of `pages` [B, M] for `gather`: int64 [2, B, G, M], flattened."""
        heads = torch.arange(2 * self.shape.kv_heads).view(2, 1, -1, 1)
        runs = pages[None, :, None, :] * (2 * self.shape.kv_heads) + heads
        return runs.flatten().to(self.device, non_blocking=True)

    def gather(self, layer: int, runs: Tensor) -> Tensor:
        """Copies of the named runs: keys and values [2, B * G, M * N, C] for one B."""
        run = PAGE_TOKENS * self.shape.head_width
        return self.data[layer].view(-1, run).index_select(0, runs)


class FloatWrites:
    """Where one step's rows go in float pages; described once, used by every layer."""

    def __init__(self, pages: FloatPages, spans: Sequence[Span]) -> None:
        self._pages = pages
        positions = [(span, p) for span in spans for p in range(span.start, span.end)]
        page_T = torch.tensor([span.pages[p // PAGE_TOKENS] for span, p in positions]).long()
        offset_T = torch.tensor([p % PAGE_TOKENS for _, p in positions]).long()
        heads = torch.arange(2 * pages.shape.kv_heads)
        run_TH = page_T[:, None] * (2 * pages.shape.kv_heads) + heads
        places = run_TH * PAGE_TOKENS + offset_T[:, None]
        self._places = places.flatten().to(pages.device, non_blocking=True)

    def before_attention(self, layer: int, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Stores the step's keys and values."""
        shape = self._pages.shape
        kv = torch.cat((k_TGC, v_TGC), dim=1).to(shape.dtype)
        rows = self._pages.data[layer].view(-1, shape.head_width)
        rows.index_copy_(0, self._places, kv.view(-1, shape.head_width))

    def after_attention(self, layer: int) -> None:
        """Nothing: pages stay as they were written."""


class CodedPages:
    """Finished pages as records of 8-bit codes, uint8 `[L, P, record]` (`PageLayout`), and open
    pages token after token: `open` `[L, 2, S * N, G, C]`, keys and values."""

    chunk_multiple = PAGE_TOKENS
    """A chunk that leaves some of its prompt must end with a page, so that no chunk ever begins
    inside of one: a page is then sealed from the rows of one chunk."""

    def __init__(self, shape: PageShape, pages: int, slots: int, device: torch.device) -> None:
        self.shape = shape
        self.layout = shape.layout
        size = (shape.layers, pages, self.layout.record_bytes)
        self.records = _zeros(pages * shape.page_bytes, device).view(size)
        rows = (shape.layers, 2, slots * PAGE_TOKENS, shape.kv_heads, shape.head_width)
        self.open = _zeros(slots * shape.slot_bytes, device).view(shape.dtype).view(rows)

    @property
    def device(self) -> torch.device:
        return self.records.device

    def writes(self, spans: Sequence[Span]) -> CodedWrites:
        """How a step whose rows are those of the spans, in order, stores them."""
        return CodedWrites(self, spans)


class CodedWrites:
    """What one step does to coded pages; described once, used by every layer.

    Before attention, the pages that chunks of prompts finish are sealed from the step's rows, and
    the rows of pages that stay open are appended; after it, the pages that decoding sequences
    finish are sealed from their open pages. Each is a list of (from row, to place or page).
    """

    def __init__(self, pages: CodedPages, spans: Sequence[Span]) -> None:
        self._pages = pages
        finished: list[tuple[int, int]] = []
        opened: list[tuple[int, int]] = []
        filled: list[tuple[int, int]] = []
        row = 0
        for span in spans:
            first = span.slot * PAGE_TOKENS
            whole = span.start
            if span.start % PAGE_TOKENS == 0:
                whole = span.end - span.end % PAGE_TOKENS
            elif span.end % PAGE_TOKENS == 0:
                filled.append((first, span.pages[span.start // PAGE_TOKENS]))
            finished += [
                (row + start - span.start, span.pages[start // PAGE_TOKENS])
                for start in range(span.start, whole, PAGE_TOKENS)
            ]
            opened += [
                (row + position - span.start, first + position % PAGE_TOKENS)
                for position in range(whole, span.end)
            ]
            row += span.length
        lists = (finished, opened, filled)
        # One copy to the device instead of three.
        pairs = [*finished, *opened, *filled]
        sides = [[pair[side] for pair in pairs] for side in (0, 1)]
        columns = torch.tensor(sides, dtype=torch.int32).to(pages.device, non_blocking=True)
        self._finished, self._opened, self._filled = torch.split(
            columns, list(map(len, lists)), dim=1
        )

    def before_attention(self, layer: int, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Stores the step's keys and values."""
        pages = self._pages
        k_TGC, v_TGC = k_TGC.to(pages.shape.dtype), v_TGC.to(pages.shape.dtype)
        if self._finished.numel():
            rows, sealed = self._finished
            seal_pages(pages.records[layer], pages.layout, k_TGC, v_TGC, rows, sealed)
        if self._opened.numel():
            rows, places = self._opened
            open_k, open_v = pages.open[layer]
            append_rows(open_k, open_v, k_TGC, v_TGC, rows, places)

    def after_attention(self, layer: int) -> None:
        """Seals the open pages that the step filled."""
        pages = self._pages
        if self._filled.numel():
            rows, sealed = self._filled
            open_k, open_v = pages.open[layer]
            seal_pages(pages.records[layer], pages.layout, open_k, open_v, rows, sealed)


KVPages = FloatPages | CodedPages


def make_pages(shape: PageShape, pages: int, slots: int, device: torch.device) -> KVPages:
    """Memory for so many pages, and for so many sequences under way."""
    if shape.codes is None:
        return FloatPages(shape, pages, device)
    return CodedPages(shape, pages, slots, device)


def _zeros(size: int, device: torch.device) -> Tensor:
    """So many bytes. On a CPU numpy's take no time and no memory until they are written."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(size, dtype=np.uint8))
    return torch.zeros(size, dtype=torch.uint8, device=device)
