"""Decode attention: one query token a sequence against all of its pages, bound by KV bytes.

Plain PyTorch form: the pages of a group of sequences are gathered into one padded block and read by
two batched products. Sequences of very different lengths would waste the padding, so rows are
grouped by length first (`group_by_length`, a pure function).

Shapes: B sequences, M pages of the longest, H query heads, G KV heads, R = H / G query heads that
share a KV head, N tokens per page, C head width, S = M * N padded tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fourfold.quadrants.kv_pages import PAGE_TOKENS, KVPages

# Reading this many padded tokens costs about as much as one more group of small launches.
_GROUP_COST_TOKENS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeGroup:
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


def describe_decode(
    lengths: Sequence[int],
    tables: Sequence[Sequence[int]],
    pages: KVPages,
) -> tuple[DecodeGroup, ...]:
    """The groups for sequences of `lengths` tokens, new ones included, in the pages of `tables`."""
    groups = group_by_length(lengths)
    described = []
    for group in groups:
        group = sorted(group)
        used = [-(-lengths[index] // PAGE_TOKENS) for index in group]
        longest = max(used)
        table = [
            [*tables[i][:n], *([tables[i][0]] * (longest - n))]
            for i, n in zip(group, used, strict=True)
        ]
        length_B = torch.tensor([lengths[index] for index in group])
        beyond = torch.arange(longest * PAGE_TOKENS)[None] >= length_B[:, None]
        mask = torch.zeros(beyond.shape, dtype=pages.shape.dtype).masked_fill_(
            beyond, float("-inf")
        )
        described.append(
            DecodeGroup(
                rows_B=None if len(groups) == 1 else torch.tensor(group).to(pages.device),
                runs=pages.runs(torch.tensor(table)),
                mask=mask[:, None, None, :].to(pages.device, non_blocking=True),
            )
        )
    return tuple(described)


def decode_attention(
    q_BHC: Tensor, pages: KVPages, layer: int, groups: Sequence[DecodeGroup]
) -> Tensor:
    """Softmax(q k^T / sqrt(C)) v over each sequence's pages; [B, H, C] in the dtype of `q_BHC`."""
    if len(groups) == 1:
        return _attend(q_BHC, pages, layer, groups[0])
    out_BHC = torch.empty_like(q_BHC)
    for group in groups:
        assert group.rows_B is not None
        out_BHC[group.rows_B] = _attend(q_BHC[group.rows_B], pages, layer, group)
    return out_BHC


def _attend(q_BHC: Tensor, pages: KVPages, layer: int, group: DecodeGroup) -> Tensor:
    batch, heads, width = q_BHC.shape
    kv_heads, tokens = pages.shape.kv_heads, group.mask.shape[-1]
    shared = heads // kv_heads
    k, v = pages.gather(layer, group.runs).view(2, batch * kv_heads, tokens, width)
    q = q_BHC.to(k.dtype).reshape(batch * kv_heads, shared, width)
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, kv_heads, shared, tokens)
    weights = torch.add(group.mask, scores, alpha=width**-0.5).softmax(-1)
    out = torch.bmm(weights.view(batch * kv_heads, shared, tokens), v)
    return out.view(batch, heads, width).to(q_BHC.dtype)
