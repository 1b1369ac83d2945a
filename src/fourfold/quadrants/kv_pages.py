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
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fourfold.kernels.device_memory import DeviceMemoryError, share
from fourfold.kernels.pages import SealJobs, seal_pages
from fourfold.kernels.pages.layout import PAGE_TOKENS, PageCodes, PageLayout
from fourfold.kernels.rope import OpenRows
from fourfold.kernels.staging import Ints, Staging
from fourfold.transport.peer import DeviceMemory
from fourfold.transport.shared import SharedRegion

__all__ = [
    "PAGE_TOKENS",
    "CodedPages",
    "FloatPages",
    "KVPages",
    "PageShape",
    "Span",
    "make_pages",
]


logger = logging.getLogger(__name__)


class Span(NamedTuple):
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


class PageMemory:
    """Zeros, `bytes` uint8 [size], that other processes of the machine may read: a CPU's always, as
    `region`; a GPU's if it is to be `shared`, as `device_memory`."""

    def __init__(self, size: int, device: torch.device, *, shared: bool) -> None:
        self.region: SharedRegion | None = None
        self.device_memory: DeviceMemory | None = None
        if device.type == "cpu":  # takes no time and no memory until it is written
            self.region = SharedRegion(size)
            self.bytes = torch.frombuffer(self.region.buffer, dtype=torch.uint8)
            return
        if shared:
            try:
                self.bytes, self.device_memory = share(size, device)
                return
            except DeviceMemoryError as error:
                logger.warning("pages go to other workers through the host: %s", error)
        self.bytes = torch.zeros(size, dtype=torch.uint8, device=device)


class FloatPages:
    """Keys and values in one tensor `[L, P, 2, G, N, C]`, so a page of a layer is one piece."""

    chunk_multiple = 1
    """Chunks of a prompt may be cut after any token."""

    def __init__(
        self, shape: PageShape, pages: int, device: torch.device, *, shared: bool = False
    ) -> None:
        size = (shape.layers, pages, 2, shape.kv_heads, PAGE_TOKENS, shape.head_width)
        self.shape = shape
        # Zeros, not garbage: masked positions of a fresh page are multiplied by zero, and a NaN
        # would survive that.
        memory = PageMemory(pages * shape.page_bytes, device, shared=shared)
        self.memory = (memory,)
        self.data = memory.bytes.view(shape.dtype).view(size)

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

    def __init__(
        self,
        shape: PageShape,
        pages: int,
        slots: int,
        device: torch.device,
        *,
        shared: bool = False,
    ) -> None:
        self.shape = shape
        self.layout = shape.layout
        size = (shape.layers, pages, self.layout.record_bytes)
        records = PageMemory(pages * shape.page_bytes, device, shared=shared)
        self.records = records.bytes.view(size)
        rows = (shape.layers, 2, slots * PAGE_TOKENS, shape.kv_heads, shape.head_width)
        opened = PageMemory(slots * shape.slot_bytes, device, shared=shared)
        self.open = opened.bytes.view(shape.dtype).view(rows)
        self.memory = (records, opened)

    @property
    def device(self) -> torch.device:
        return self.records.device


class CodedWrites:
    """What one step does to coded pages; described once, used by every layer.

    Before attention, keys and values go to the open pages and the pages that chunks of prompts
    finish are sealed from the step's rows; after it, the pages that decoding sequences finish are
    sealed from their open pages. `arrays` on the pages' device hold, as `sizes` names them: the
    place of each row in the open pages (-1: none), and two lists of jobs, (from row, to page),
    that end with jobs to -1.
    """

    def __init__(self, pages: CodedPages, arrays: Staging) -> None:
        self._pages = pages
        self._place_T = arrays["places"]
        self._finished, self._filled = (arrays[name].view(2, -1) for name in ("finished", "filled"))

    @staticmethod
    def sizes(decode_rows: int, prefill_rows: int) -> dict[str, int]:
        """Words of each array, for steps of so many rows at most."""
        return {
            "places": decode_rows + prefill_rows,
            "finished": 2 * (prefill_rows // PAGE_TOKENS),
            "filled": 2 * decode_rows,
        }

    @staticmethod
    def arrays(
        decodes: Sequence[Span], prefills: Sequence[Span], decode_rows: int, prefill_rows: int
    ) -> dict[str, Ints]:
        """The arrays of a step whose chunks' rows begin after `decode_rows`."""
        filled = [
            (span.slot * PAGE_TOKENS, span.pages[span.start // PAGE_TOKENS])
            for span in decodes
            if span.end % PAGE_TOKENS == 0
        ]
        places = np.full(decode_rows + prefill_rows, -1, np.int32)
        places[: len(decodes)] = [
            span.slot * PAGE_TOKENS + span.start % PAGE_TOKENS for span in decodes
        ]
        finished = [np.empty((2, 0), np.int32)]
        row = decode_rows
        for span in prefills:
            assert span.start % PAGE_TOKENS == 0, "a chunk begins with a page"
            first, whole = span.start // PAGE_TOKENS, span.length // PAGE_TOKENS
            rows = np.arange(row, row + whole * PAGE_TOKENS, PAGE_TOKENS, dtype=np.int32)
            finished.append(np.stack((rows, span.pages[first : first + whole])))
            rest = span.length % PAGE_TOKENS
            row += span.length
            places[row - rest : row] = span.slot * PAGE_TOKENS + np.arange(rest)
        return {
            "places": places,
            "finished": _jobs(np.concatenate(finished, axis=1), prefill_rows // PAGE_TOKENS),
            "filled": _jobs(np.array(filled, np.int32).reshape(-1, 2).T, decode_rows),
        }

    def opened(self, layer: int) -> OpenRows:
        """Where the rows' keys and values go."""
        open_k, open_v = self._pages.open[layer]
        return OpenRows(open_k, open_v, self._place_T)

    def before_attention(self, layer: int, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Seals the pages that chunks of prompts finish."""
        pages = self._pages
        rows, sealed = self._finished
        seal_pages(pages.records[layer], pages.layout, k_TGC, v_TGC, rows, sealed)

    def after_attention(self, layer: int) -> SealJobs | None:
        """Sealing the open pages that the step filled."""
        if not self._filled.numel():
            return None
        pages = self._pages
        return SealJobs(pages.records[layer], pages.layout, *pages.open[layer], *self._filled)


def _jobs(pairs_2J: Ints, size: int) -> Ints:
    """Jobs (from, to), filled up with none; int32 [2, size]."""
    jobs = np.full((2, size), -1, dtype=np.int32)
    jobs[:, : pairs_2J.shape[1]] = pairs_2J
    return jobs


KVPages = FloatPages | CodedPages


def make_pages(
    shape: PageShape, pages: int, slots: int, device: torch.device, *, shared: bool = False
) -> KVPages:
    """Memory for so many pages, and for so many sequences under way; `shared` as in
    `PageMemory`."""
    if shape.codes is None:
        return FloatPages(shape, pages, device, shared=shared)
    return CodedPages(shape, pages, slots, device, shared=shared)
