"""The memory that attention reads: keys and values of all layers, in pages of N tokens.

A page holds N consecutive tokens of one sequence in every layer. Rows of one (page, KV head) are
contiguous, so that gathering, quantising and sending a page each touch whole runs of memory.

Shapes: L layers, P pages, G KV heads, N tokens per page, C head width, T tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
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
    """Keys and values in one tensor `[L, P, 2, G, N, C]`, so a page of a layer is one piece.

    Who may use which page is decided elsewhere (`engine.page_pool`); this only stores.
    """

    def __init__(self, shape: PageShape, pages: int, device: torch.device) -> None:
        size = (shape.layers, pages, 2, shape.kv_heads, PAGE_TOKENS, shape.head_width)
        self.shape = shape
        # Zeros, not garbage: masked positions of a fresh page are multiplied by zero, and a NaN
        # would survive that. numpy's zeros take no time and no memory until they are written.
        if device.type == "cpu":
            raw = np.zeros(pages * shape.page_bytes, dtype=np.uint8)
            self.data = torch.from_numpy(raw).view(shape.dtype).view(size)
        else:
            self.data = torch.zeros(size, dtype=shape.dtype, device=device)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def places(self, page_T: Tensor, offset_T: Tensor) -> Tensor:
        """Names where `write` stores each row's heads: at `offset_T[t]` of page `page_T[t]`."""
        heads = torch.arange(2 * self.shape.kv_heads)
        run_TH = page_T[:, None] * (2 * self.shape.kv_heads) + heads
        places = run_TH * PAGE_TOKENS + offset_T[:, None]
        return places.flatten().to(self.device, non_blocking=True)

    def write(self, layer: int, places: Tensor, k_TGC: Tensor, v_TGC: Tensor) -> None:
        """Stores the rows' keys and values at the places named."""
        width = self.shape.head_width
        kv = torch.cat((k_TGC, v_TGC), dim=1).to(self.shape.dtype)
        self.data[layer].view(-1, width).index_copy_(0, places, kv.view(-1, width))

    def runs(self, pages: Tensor) -> Tensor:
        """Names the runs of `pages` [B, M] for `gather`: int64 [2, B, G, M], flattened."""
        heads = torch.arange(2 * self.shape.kv_heads).view(2, 1, -1, 1)
        runs = pages[None, :, None, :] * (2 * self.shape.kv_heads) + heads
        return runs.flatten().to(self.device, non_blocking=True)

    def gather(self, layer: int, runs: Tensor) -> Tensor:
        """Copies of the named runs: keys and values [2, B * G, M * N, C] for one B."""
        run = PAGE_TOKENS * self.shape.head_width
        return self.data[layer].view(-1, run).index_select(0, runs)
