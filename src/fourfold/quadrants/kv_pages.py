"""The memory that attention reads: keys and values of all layers, in pages of N tokens.

A page holds N consecutive tokens of one sequence in every layer. Rows of one (page, KV head) are
contiguous, so that gathering, quantising and sending a page each touch whole runs of memory.

Shapes: L layers, P pages, G KV heads, N tokens per page, C head width, T tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

PAGE_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageShape:
    """What one page holds: keys and values of N tokens in every layer."""

    layers: int
    kv_heads: int
    head_width: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        per_layer = 2 * self.kv_heads * PAGE_TOKENS * self.head_width
        return self.layers * per_layer * self.dtype.itemsize


class KVPages:
    """Keys and values `[L, P, G, N, C]`.

    Who may use which page is decided elsewhere (`engine.page_pool`); this only stores.
    """

    def __init__(self, shape: PageShape, pages: int, device: torch.device) -> None:
        size = (shape.layers, pages, shape.kv_heads, PAGE_TOKENS, shape.head_width)
        # Zeros, not garbage: masked positions of a fresh page are multiplied by zero, and a NaN
        # would survive that. On a CPU untouched zeros take no memory.
        self.keys = torch.zeros(size, dtype=shape.dtype, device=device)
        self.values = torch.zeros(size, dtype=shape.dtype, device=device)

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[2]

    def write(
        self, layer: int, page_T: Tensor, offset_T: Tensor, k_TGC: Tensor, v_TGC: Tensor
    ) -> None:
        """Stores row t at `offset_T[t]` of page `page_T[t]`."""
        self.keys[layer][page_T, :, offset_T] = k_TGC.to(self.keys.dtype)
        self.values[layer][page_T, :, offset_T] = v_TGC.to(self.values.dtype)

    def gather(self, layer: int, head_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the runs `page * G + head` for each entry; two tensors [len, N, C]."""
        rows = (-1, PAGE_TOKENS * self.keys.shape[4])
        k = self.keys[layer].view(rows).index_select(0, head_rows)
        v = self.values[layer].view(rows).index_select(0, head_rows)
        shape = (-1, PAGE_TOKENS, self.keys.shape[4])
        return k.view(shape), v.view(shape)
