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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourfold.kernels.pages.layout import PAGE_TOKENS
from fourfold.kernels.staging import Ints, Staging, padded

SUBTILE_ROWS = 64
SUBTILES = 2


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


class PrefillRoom(NamedTuple):
    """The largest step there is room for. One chunk more is kept, which is empty: tiles beyond a
    step's are of it, and do nothing."""

    chunks: int
    rows: int
    pages: int
    """That a chunk reads at most."""

    def sizes(self, group: int) -> dict[str, int]:
        """Words of each array, where `group` padded query heads share a KV head."""
        return {
            "starts": self.chunks + 1,
            "lengths": self.chunks + 1,
            "prefix_pages": self.chunks + 1,
            "tiles": 2 * (self.rows // tile_tokens(group) + self.chunks),
            "table": (self.chunks + 1) * self.pages,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillBatch:
    """What `paged_int8_attention_prefill` needs to know about a step; all tensors int32."""

    chunks: tuple[PrefillChunk, ...]
    """For the reference alone: kernels read the tensors."""
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

    @classmethod
    def over(
        cls,
        arrays: Staging,
        chunks: Sequence[PrefillChunk],
        heads: int,
        kv_heads: int,
    ) -> PrefillBatch:
        """A batch whose tensors are these arrays, as `PrefillRoom.sizes` names them."""
        return cls(
            chunks=tuple(chunks),
            heads=heads,
            kv_heads=kv_heads,
            starts_B=arrays["starts"],
            lengths_B=arrays["lengths"],
            prefix_pages_B=arrays["prefix_pages"],
            table_BM=arrays["table"].view(len(arrays["starts"]), -1),
            tiles_W2=arrays["tiles"].view(-1, 2),
        )


def tile_tokens(group: int) -> int:
    """Tokens of a tile, where `group` padded query heads share a KV head."""
    return SUBTILES * max(1, SUBTILE_ROWS // group)


def padded_group(heads: int, kv_heads: int) -> int:
    """Query heads that share a KV head, rounded up to a power of two."""
    return 1 << (heads // kv_heads - 1).bit_length()


def check_chunks(chunks: Sequence[PrefillChunk]) -> None:
    """Asserts what is expected of a step's chunks."""
    for chunk in chunks:
        assert chunk.rows > 0, chunk
        assert chunk.prefix_tokens % PAGE_TOKENS == 0, chunk
        assert len(chunk.page_ids) >= chunk.pages_read, "pages before the last row's are sealed"


def prefill_arrays(
    chunks: Sequence[PrefillChunk], room: PrefillRoom, group: int
) -> dict[str, Ints]:
    """The arrays that describe a step, filled up with what is empty; `table` comes last and holds
    only the chunks of the step."""
    check_chunks(chunks)
    fields = np.array([chunk[:3] for chunk in chunks], dtype=np.int32).reshape(-1, 3)
    table_BM = np.zeros((len(chunks), room.pages), dtype=np.int32)
    for row_M, chunk in zip(table_BM, chunks, strict=True):
        row_M[: chunk.pages_read] = chunk.page_ids[: chunk.pages_read]
    tiles_W2 = _tiles(fields, tile_tokens(group))
    empty = np.zeros((room.sizes(group)["tiles"] // 2 - len(tiles_W2), 2), dtype=np.int32)
    empty[:, 0] = room.chunks
    return {
        "starts": padded(fields[:, 0], room.chunks + 1, 0),
        "lengths": padded(fields[:, 1], room.chunks + 1, 0),
        "prefix_pages": padded(fields[:, 2] // PAGE_TOKENS, room.chunks + 1, 0),
        "tiles": np.concatenate((tiles_W2, empty)),
        "table": table_BM,
    }


def describe_prefill(
    chunks: Sequence[tuple[int, int, int, Sequence[int]]],
    *,
    heads: int,
    kv_heads: int,
    device: torch.device,
) -> PrefillBatch:
    """Lays out chunks, each (first row, rows, prefix tokens, page ids) as in `PrefillChunk`, on a
    device, with just enough room and without waiting for it.

    A chunk has at least one row and starts at a page (`prefix_tokens` is a multiple of 64).
    """
    described = tuple(PrefillChunk(*chunk) for chunk in chunks)
    assert described
    assert heads % kv_heads == 0
    group = padded_group(heads, kv_heads)
    room = PrefillRoom(
        chunks=len(described),
        rows=sum(chunk.rows for chunk in described),
        pages=max(1, max(chunk.pages_read for chunk in described)),
    )
    arrays = Staging(room.sizes(group), device)
    arrays.load(prefill_arrays(described, room, group))
    return PrefillBatch.over(arrays, described, heads, kv_heads)


def _tiles(fields_B3: Ints, tokens: int) -> NDArray[np.int32]:
    """[W, 2]: chunk and first token of each tile, those that read most pages first."""
    rows_B, prefix_B = fields_B3[:, 1], fields_B3[:, 2]
    tiles_B = -(-rows_B // tokens)
    chunk_W = np.repeat(np.arange(len(rows_B), dtype=np.int32), tiles_B)
    before_B = np.cumsum(tiles_B) - tiles_B
    first_W = (np.arange(len(chunk_W), dtype=np.int32) - before_B[chunk_W]) * tokens
    end_W = np.minimum(first_W + tokens, rows_B[chunk_W])
    pages_W = (prefix_B[chunk_W] + end_W - 1) // PAGE_TOKENS
    order_W = np.argsort(-pages_W, kind="stable")
    return np.stack((chunk_W, first_W), axis=1)[order_W].astype(np.int32)
