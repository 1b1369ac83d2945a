"""Pages in the memory of a GPU: copies on their way, in pinned memory of the host.

What is read must be complete; steps enqueued on the current stream wait for what has landed.

Shapes: L layers, P pages, W words of a record, R rows, G KV heads, C head width.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fourfold.engine.handover.landing import PromptLanding
from fourfold.engine.handover.pages import (
    Prompt,
    in_steps,
    page_format,
    rows_of,
    runs,
    side_stream,
    view,
)
from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages, KVPages


class StagedPages:
    """An engine's pages on a device, as they are; an `Outlet` for receivers of the same format."""

    def __init__(self, pages: KVPages) -> None:
        self.format = page_format(pages)
        self.record_bytes = self.format.record_bytes
        memory = pages.records if isinstance(pages, CodedPages) else pages.data
        self.records_LPW = memory.flatten(2).view(torch.int64)
        self.open_L2RGC = pages.open if isinstance(pages, CodedPages) else None
        # What is sent must not wait for steps, as what lands does.
        self._stream, self._landing_stream = side_stream(pages), side_stream(pages)

    def records(
        self, layers: Sequence[int], prompt: Prompt, first: int, count: int
    ) -> list[list[memoryview]]:
        memory_LPW, place = self.records_LPW, 0
        with torch.cuda.stream(self._stream):
            ids_P = torch.tensor(prompt.pages[first : first + count], device=memory_LPW.device)
            found_LPW = memory_LPW.new_empty(len(layers), count, memory_LPW.shape[2])
            for run in runs(layers):
                end = place + run.stop - run.start
                torch.index_select(memory_LPW[run], 1, ids_P, out=found_LPW[place:end])
                place = end
            return [[view(copy_PW)] for copy_PW in self._fetch(found_LPW)]

    def rows(self, layers: Sequence[int], prompt: Prompt) -> list[list[memoryview]]:
        assert self.open_L2RGC is not None
        first = prompt.slot * PAGE_TOKENS
        end = first + rows_of(self.format, prompt.tokens)
        with torch.cuda.stream(self._stream):
            found = [self.open_L2RGC[layer, :, first:end] for layer in layers]
            return [[view(rows) for rows in copy_2] for copy_2 in self._fetch(torch.stack(found))]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is enqueued meanwhile runs on a stream of its own, after all that is on the current
        one and before all that follows there."""
        if self._landing_stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.records_LPW.device)
        self._landing_stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._landing_stream):
                yield
        finally:
            current.wait_stream(self._landing_stream)

    def _fetch(self, found: Tensor) -> Tensor:
        """A copy on the host, which is waited for."""
        if self._stream is None:
            return found
        copy = torch.empty_like(found, device="cpu", pin_memory=True)
        copy.copy_(found, non_blocking=True)
        self._stream.synchronize()
        return copy


class StagedLanding(PromptLanding):
    """A prompt lands on the host and is moved to the device as a whole."""

    def __init__(self, memory: StagedPages, prompt: Prompt, found: int) -> None:
        super().__init__(memory.format, prompt, found)
        self._memory = memory
        self._ids = prompt.pages[found : found + self.pages]
        self._row = prompt.slot * PAGE_TOKENS
        self._row_count = rows_of(memory.format, prompt.tokens)
        self._lock = threading.Lock()

    def land(self) -> None:
        # On a stream on which nothing is recorded: when pinned memory is let go of, by any
        # thread, PyTorch marks the streams that read it, and marks that become part of a graph fail
        # whoever asks for pinned memory next (pytorch/pytorch#193982).
        with self._memory.aside():
            self._enqueue()

    def _enqueue(self) -> None:
        records_LPW = self._memory.records_LPW
        device = records_LPW.device
        ids = torch.tensor(self._ids, device=device)
        size = self._memory.record_bytes
        for layers, first, end in in_steps(range(self.layers), 0, self.pages, size):
            [of] = runs(layers)
            landed = self._landed[0][of, first:end].to(device, non_blocking=True)
            records_LPW[of].index_copy_(1, ids[first:end], landed)
            del landed  # before the next
        open_L2RGC = self._memory.open_L2RGC
        if self.open and open_L2RGC is not None:
            rows = open_L2RGC[:, :, self._row : self._row + self._row_count]
            rows.copy_(self._landed[1], non_blocking=True)

    def _records(self, layer: int, first: int, count: int) -> list[memoryview]:
        with self._lock:
            return [view(self._landed[0][layer, first : first + count])]

    def _rows(self, layer: int) -> list[memoryview]:
        with self._lock:
            return [view(rows) for rows in self._landed[1][layer]]

    @functools.cached_property
    def _landed(self) -> tuple[Tensor, Tensor]:
        """Memory of the host, taken when the first bytes come: records [L, P, W], rows
        [L, 2, R, G, C]."""
        records_LPW = self._memory.records_LPW
        pinned = records_LPW.is_cuda
        records = torch.empty(
            (self.layers, self.pages, records_LPW.shape[2]), dtype=torch.int64, pin_memory=pinned
        )
        open_L2RGC = self._memory.open_L2RGC
        if open_L2RGC is None:
            return records, torch.empty(0)
        shape = (self.layers, 2, self._row_count, *open_L2RGC.shape[3:])
        return records, torch.empty(shape, dtype=open_L2RGC.dtype, pin_memory=pinned)
