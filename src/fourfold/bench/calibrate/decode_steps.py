"""Timing plans of decode attention on random data: to fit the cost model, to see what a plan loses.

A step is timed as it is served: one call after another in a CUDA graph, each on pages of its own
(another layer's), so that no call finds its pages in the cache; with buffers that hold other plans
too, and with the merge on the way to the 8-bit rows that the output projection reads.

Shapes: B sequences, L layers, P pages, S sequence slots.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import numpy as np
import torch

from fourfold.kernels.decode_attention.attend import (
    merge_and_quantize,
    paged_int8_attention_decode,
    paged_int8_attention_decode_unmerged,
)
from fourfold.kernels.decode_attention.buffers import PlanBuffers, PlanCapacity
from fourfold.kernels.decode_attention.plan import (
    DecodePlan,
    DecodeSequences,
    DecodeShape,
)
from fourfold.kernels.pages.layout import PAGE_TOKENS, PageLayout
from fourfold.kernels.rows.reference import Rows

_CACHE_BYTES = 150e6
"""So many bytes of pages between two uses of the same: three times the L2 of an H100."""
_MOST_LAYERS = 256
_REPLAYS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOf:
    """A kind of step: how long its sequences are, and what they share."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, new rows included."""
    shape: DecodeShape
    siblings: int = 1
    """So many sequences after one another begin with the same pages."""
    shared_pages: int = 0

    def sequences(self, seed: int = 0) -> DecodeSequences:
        """With pages in random order."""
        rng = np.random.default_rng(seed)
        lengths_B = np.array(self.lengths, np.int64)
        sealed_B = (lengths_B - 1) // PAGE_TOKENS
        places = rng.permutation(int(sealed_B.sum())).astype(np.int32)
        pages = np.split(places, np.cumsum(sealed_B)[:-1])
        for b, table in enumerate(pages):
            first = b - b % self.siblings
            table[: self.shared_pages] = pages[first][: self.shared_pages]
        return DecodeSequences(lengths_B, pages, rng.permutation(len(lengths_B)))

    @property
    def page_bytes(self) -> int:
        """Bytes that have to be read of keys and values, shared pages once."""
        shape = self.shape
        values = 2 * shape.kv_heads * shape.head_width
        sealed = [(length - 1) // PAGE_TOKENS for length in self.lengths]
        opened = sum(self.lengths) - PAGE_TOKENS * sum(sealed)
        groups = -(-len(self.lengths) // self.siblings)
        once = sum(sealed) - (len(self.lengths) - groups) * self.shared_pages
        return values * (PAGE_TOKENS * once + 2 * opened)


class RandomStep:
    """A step's tensors for enough layers that they do not fit in the cache."""

    def __init__(self, step: StepOf, device: torch.device, layers: int | None = None) -> None:
        shape = self.shape = step.shape
        self.layout = PageLayout(kv_heads=shape.kv_heads, head_width=shape.head_width)
        self.sequences = step.sequences()
        count, pages = len(step.lengths), int(self.sequences.sealed_B.sum()) + 1
        record = self.layout.record_bytes
        enough = min(_MOST_LAYERS, max(2, int(_CACHE_BYTES // (pages * record)) + 1))
        self.layers = enough if layers is None else layers
        size = (self.layers, pages, record)
        self.records = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        scales = self.layout.views(self.records).scales
        scales.copy_(torch.rand(scales.shape, device=device) * 0.02 + 0.005)
        slots = (self.layers, count * PAGE_TOKENS, shape.kv_heads, shape.head_width)
        self.open_k = torch.randn(slots, dtype=torch.bfloat16, device=device)
        self.open_v = torch.randn_like(self.open_k)
        rows = (self.layers, count * shape.rows, shape.heads, shape.head_width)
        self.q = torch.randn(rows, dtype=torch.bfloat16, device=device)

    def buffers(self, plan: DecodePlan) -> PlanBuffers:
        """Buffers with a plan in them, as large as a graph that serves it would have them."""
        device = self.q.device
        buffers = PlanBuffers(plan.shape, PlanCapacity.covering(plan, self.q.shape[1]), device)
        buffers.load(plan)
        return buffers

    def attend(self, layer: int, buffers: PlanBuffers) -> torch.Tensor:
        """One layer's attention, [R, H, C]."""
        return paged_int8_attention_decode(*self.arguments(layer), buffers)

    def code(self, layer: int, buffers: PlanBuffers) -> Rows:
        """One layer's attention as 8-bit rows."""
        out_RHC = paged_int8_attention_decode_unmerged(*self.arguments(layer), buffers)
        width = self.shape.heads * self.shape.head_width
        return merge_and_quantize(out_RHC, buffers, torch.int8, width)

    def arguments(
        self, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, PageLayout]:
        """What attention is asked with, but for a plan."""
        pages = self.records[layer], self.open_k[layer], self.open_v[layer]
        return self.q[layer], *pages, self.layout

    def seconds(self, plan: DecodePlan) -> float:
        """Of one layer by a plan."""
        buffers = self.buffers(plan)

        def all_layers() -> None:
            for layer in range(self.layers):
                self.code(layer, buffers)

        return _replayed(all_layers) / self.layers


def calibration_points() -> list[StepOf]:
    """Steps that together bring out every coefficient, of 4 KV heads of 128."""
    one, four = (DecodeShape(heads=32, kv_heads=4, head_width=128, rows=n) for n in (1, 4))
    mixed = tuple(int(2 * 2 ** (i / 4)) * PAGE_TOKENS + 40 for i in range(33))
    return [
        StepOf(lengths=(40,), shape=one),
        StepOf(lengths=(1000,), shape=one),
        StepOf(lengths=(8000,), shape=one),
        StepOf(lengths=(30000,), shape=one),
        StepOf(lengths=(2000,) * 8, shape=one),
        StepOf(lengths=(500,) * 64, shape=one),
        StepOf(lengths=(4000,) * 64, shape=one),
        StepOf(lengths=(500,) * 256, shape=one),
        StepOf(lengths=mixed, shape=one),
        StepOf(lengths=mixed, shape=four),
        StepOf(lengths=(1000,) * 8, shape=one, siblings=8, shared_pages=14),
        StepOf(lengths=(8500,) * 8, shape=one, siblings=8, shared_pages=128),
        StepOf(lengths=(4500,) * 64, shape=one, siblings=8, shared_pages=64),
    ]


def _replayed(work: Callable[[], object]) -> float:
    """Median seconds of a replay of `work` as a graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times: list[float] = []
    for _ in range(_REPLAYS):
        begin = torch.Event("cuda", enable_timing=True)
        end = torch.Event("cuda", enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
