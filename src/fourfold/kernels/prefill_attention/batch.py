"""A ragged batch of prompt chunks laid out for attention: made once a step, used by every layer.

A tile of work is two subtiles of 64 rows, where a row is a token with one of the query heads that
share a KV head. A subtile never crosses a page: then every page before its own is attended to
whole, and only its own page needs a mask. Heads that share a KV head are padded to a power of two,
so that 64 rows are a whole number of tokens and divide a page. Tiles are listed with the longest
first, the order in which the hardware starts them: the short ones fill the gaps at the end.

Shapes: B chunks, M pages in the longest table, W tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.kernels.pages.layout import PAGE_TOKENS

SUBTILE_ROWS = 64
SUBTILES = 2
_ALIGNMENT = 4  # int32s: kernels are compiled for pointers that are multiples of 16 bytes


class PrefillChunk(NamedTuple):
    """Consecutive tokens of one sequence, all in one step."""

    first_row: int
    """Of q, k, v and the output."""
    rows: int
    prefix_tokens: int
    """Tokens of the sequence before the chunk: whole pages."""
    page_ids: Sequence[int]
    """The sequence's sealed pages in order, at least those before the last row's own page."""

    @property
    def pages_read(self) -> int:
        """Sealed pages that the last row attends to."""
        return (self.prefix_tokens + self.rows - 1) // PAGE_TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillBatch:
    """What `paged_int8_attention_prefill` needs to know about a step; all tensors int32."""

    chunks: tuple[PrefillChunk, ...]
    heads: int
    kv_heads: int
    starts_B: Tensor
    """First row of a chunk."""
    lengths_B: Tensor
    prefix_pages_B: Tensor
    table_BM: Tensor
    """Pages of a chunk's sequence in order; what a row does not attend to is arbitrary."""
    tiles_W2: Tensor
    """Chunk and first token within the chunk, the longest tile first."""

    @property
    def padded_group(self) -> int:
        """Query heads of a KV head, rounded up to a power of two."""
        return padded_group(self.heads, self.kv_heads)


def padded_group(heads: int, kv_heads: int) -> int:
    """Query heads that share a KV head, rounded up to a power of two."""
    return 1 << (heads // kv_heads - 1).bit_length()


def describe_prefill(
    chunks: Sequence[tuple[int, int, int, Sequence[int]]],
    *,
    heads: int,
    kv_heads: int,
    device: torch.device,
) -> PrefillBatch:
    """Lays out chunks, each (first row, rows, prefix tokens, page ids) as in `PrefillChunk`.

    One copy to the device, from pinned memory where there is a GPU, without waiting for it. A chunk
    has at least one row and starts at a page (`prefix_tokens` is a multiple of 64).
    """
    described = tuple(PrefillChunk(*chunk) for chunk in chunks)
    assert described
    assert heads % kv_heads == 0
    for chunk in described:
        assert chunk.rows > 0, chunk
        assert chunk.prefix_tokens % PAGE_TOKENS == 0, chunk
        assert len(chunk.page_ids) >= chunk.pages_read, "pages before the last row's are sealed"
    width = max(1, max(chunk.pages_read for chunk in described))
    table = [_padded(chunk.page_ids[: chunk.pages_read], width) for chunk in described]
    parts = (
        [chunk.first_row for chunk in described],
        [chunk.rows for chunk in described],
        [chunk.prefix_tokens // PAGE_TOKENS for chunk in described],
        [page for row in table for page in row],
        [field for tile in _tiles(described, padded_group(heads, kv_heads)) for field in tile],
    )
    starts, lengths, prefix_pages, pages, tiles = _on_device(parts, device)
    return PrefillBatch(
        chunks=described,
        heads=heads,
        kv_heads=kv_heads,
        starts_B=starts,
        lengths_B=lengths,
        prefix_pages_B=prefix_pages,
        table_BM=pages.view(-1, width),
        tiles_W2=tiles.view(-1, 2),
    )


def _tiles(chunks: Sequence[PrefillChunk], group: int) -> list[tuple[int, int]]:
    tokens = SUBTILES * max(1, SUBTILE_ROWS // group)
    tiles = [(i, first) for i, chunk in enumerate(chunks) for first in range(0, chunk.rows, tokens)]

    def length(tile: tuple[int, int]) -> int:
        chunk = chunks[tile[0]]
        return (chunk.prefix_tokens + min(tile[1] + tokens, chunk.rows) - 1) // PAGE_TOKENS

    return sorted(tiles, key=lambda tile: -length(tile))


def _padded(pages: Sequence[int], width: int) -> list[int]:
    return [*pages, *[0] * (width - len(pages))]


def _on_device(parts: Sequence[list[int]], device: torch.device) -> list[Tensor]:
    """The lists as int32 tensors, each aligned, in one transfer."""
    flat: list[int] = []
    spans = []
    for part in parts:
        spans.append((len(flat), len(part)))
        flat += _padded(part, -(-len(part) // _ALIGNMENT) * _ALIGNMENT)
    packed = torch.tensor(flat, dtype=torch.int32, pin_memory=device.type == "cuda")
    packed = packed.to(device, non_blocking=True)
    return [packed[start : start + length] for start, length in spans]
