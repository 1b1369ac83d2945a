"""Decode attention: the newest token of each sequence against all before it, bound by KV bytes.

Two forms, by the kind of page memory. Over float pages: the pages of a group of sequences are
gathered into one padded block and read by two batched products; sequences of very different lengths
would waste the padding, so rows are grouped by length first (`group_by_length`, a pure function).
Over coded pages: `paged_int8_attention_decode` reads each page where it lies, splits long sequences
over the device and reads pages that sequences share once, as its plan for the step says.

Shapes: B sequences, M pages of the longest, H query heads, G KV heads, R = H / G query heads that
share a KV head, N tokens per page, C head width, S = M * N padded tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fourfold.kernels.decode_attention import (
    DecodePlanner,
    DecodeSequences,
    DecodeShape,
    PlanBuffers,
    paged_int8_attention_decode,
    paged_int8_attention_decode_reference,
    paged_int8_attention_decode_unmerged,
)
from fourfold.kernels.pages.layout import PageLayout
from fourfold.quadrants.costs import cost_of
from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages, FloatPages, Span

# Reading this many padded tokens costs about as much as one more group of small launches.
_GROUP_COST_TOKENS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
    """Sequences attended to together. Tensors live on the device of the pages.

    `rows_B` are their rows of the step (None: rows 0..B-1 in order); `runs` names their keys and
    values in the page memory; `mask` is 0 or -inf, [B, 1, 1, S].
    """

    rows_B: Tensor | None
    runs: Tensor
    mask: Tensor


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Partitions indices so that padding every group to its longest wastes little.

    Greedy from the longest: a sequence opens a new group when its padding in the current one,
    summed with that of its group so far, would cost more than a group does.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    wasted = 0
    for index in order:
        waste = lengths[groups[-1][0]] - lengths[index] if groups else 0
        if not groups or wasted + waste > _GROUP_COST_TOKENS:
            groups.append([])
            wasted = waste = 0
        groups[-1].append(index)
        wasted += waste
    return groups


class FloatDecodeAttention:
    """The decode rows of one step over float pages; described once, used by every layer."""

    def __init__(self, spans: Sequence[Span], pages: FloatPages) -> None:
        self._pages = pages
        groups = group_by_length([span.end for span in spans])
        self._groups = [
            self._describe(sorted(group), spans, alone=len(groups) == 1) for group in groups
        ]

    def _describe(self, group: list[int], spans: Sequence[Span], *, alone: bool) -> _Group:
        pages = self._pages
        used = [-(-spans[index].end // PAGE_TOKENS) for index in group]
        longest = max(used)
        table_BM = np.empty((len(group), longest), np.int64)
        for row_M, i, n in zip(table_BM, group, used, strict=True):
            row_M[:n] = spans[i].pages[:n]
            row_M[n:] = spans[i].pages[0]
        length_B = torch.tensor([spans[index].end for index in group])
        beyond = torch.arange(longest * PAGE_TOKENS)[None] >= length_B[:, None]
        mask = torch.zeros(beyond.shape, dtype=pages.shape.dtype).masked_fill_(
            beyond, float("-inf")
        )
        return _Group(
            rows_B=None if alone else torch.tensor(group).to(pages.device),
            runs=pages.runs(torch.from_numpy(table_BM)),
            mask=mask[:, None, None, :].to(pages.device, non_blocking=True),
        )

    def __call__(self, layer: int, q_BHC: Tensor) -> Tensor:
        """Softmax(q k^T / sqrt(C)) v over each sequence's pages; [B, H, C] in `q_BHC`'s dtype."""
        if len(self._groups) == 1:
            return self._attend(layer, q_BHC, self._groups[0])
        out_BHC = torch.empty_like(q_BHC)
        for group in self._groups:
            assert group.rows_B is not None
            out_BHC[group.rows_B] = self._attend(layer, q_BHC[group.rows_B], group)
        return out_BHC

    def _attend(self, layer: int, q_BHC: Tensor, group: _Group) -> Tensor:
        batch, heads, width = q_BHC.shape
        kv_heads, tokens = self._pages.shape.kv_heads, group.mask.shape[-1]
        shared = heads // kv_heads
        kv = self._pages.gather(layer, group.runs)
        k, v = kv.view(2, batch * kv_heads, tokens, width)
        q = q_BHC.to(k.dtype).reshape(batch * kv_heads, shared, width)
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, kv_heads, shared, tokens)
        weights = torch.add(group.mask, scores, alpha=width**-0.5).softmax(-1)
        out = torch.bmm(weights.view(batch * kv_heads, shared, tokens), v)
        return out.view(batch, heads, width).to(q_BHC.dtype)


def decode_sequences(spans: Sequence[Span]) -> DecodeSequences:
    """Decode rows, one span each, as planners take them."""
    return DecodeSequences(
        lengths_B=np.array([span.end for span in spans], dtype=np.int64),
        pages=[span.pages for span in spans],
        open_slots_B=np.array([span.slot for span in spans], dtype=np.int64),
    )


def decode_shape(pages: CodedPages, heads: int) -> DecodeShape:
    """What all decode steps over the pages have in common, for so many query heads."""
    shape = pages.shape
    return DecodeShape(heads=heads, kv_heads=shape.kv_heads, head_width=shape.head_width)


def decode_planner(pages: CodedPages, heads: int) -> DecodePlanner | None:
    """Who plans a GPU's decode attention, one step after the other; None on a CPU, which follows
    the reference."""
    if pages.device.type != "cuda":
        return None
    return DecodePlanner(decode_shape(pages, heads), cost_of(pages.device))


class CodedDecodeAttention:
    """Decode rows over coded pages: a GPU follows the plan that is in the buffers, a CPU (which has
    none) the reference over `sequences`."""

    def __init__(self, pages: CodedPages, plan: PlanBuffers | None) -> None:
        self._pages = pages
        self._plan = plan
        self.sequences: DecodeSequences | None = None

    def __call__(self, layer: int, q_BHC: Tensor) -> Tensor:
        """Attention of each row over its sequence; [B, H, C] in the dtype of `q_BHC`."""
        arguments = self._arguments(layer, q_BHC)
        if self._plan is None:
            assert self.sequences is not None
            return paged_int8_attention_decode_reference(*arguments, self.sequences)
        return paged_int8_attention_decode(*arguments, self._plan)

    def unmerged(self, layer: int, q_BHC: Tensor) -> Tensor:
        """The same on a GPU, but for the merge that `merge_and_quantize` does."""
        assert self._plan is not None
        return paged_int8_attention_decode_unmerged(*self._arguments(layer, q_BHC), self._plan)

    def _arguments(
        self, layer: int, q_BHC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, PageLayout]:
        pages = self._pages
        open_k, open_v = pages.open[layer]
        return q_BHC, pages.records[layer], open_k, open_v, pages.layout
