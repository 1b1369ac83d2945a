"""An engine's pages as bytes, as they go to others and come from them.

On the way a prompt is cut as the receiver keeps it: over coded pages, a record of every full page
and the rows of the one that is not full; over float pages, a record of every page.

Shapes: L layers, P pages, B bytes, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages, KVPages
from fourfold.transport.format import PageFormat

_Bytes = npt.NDArray[np.uint8]


def page_format(pages: KVPages) -> PageFormat:
    """What others must know of these pages."""
    shape = pages.shape
    dtype = str(shape.dtype).removeprefix("torch.")
    return PageFormat(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        page_tokens=PAGE_TOKENS,
        code=dtype if shape.codes is None else shape.codes.value,
        open_code=dtype,
        record_bytes=shape.page_bytes // shape.layers,
    )


def is_coded(pages: PageFormat) -> bool:
    """Whether full pages are 8-bit codes, and others kept apart."""
    return pages.code in ("int8", "fp8")


def records_of(pages: PageFormat, tokens: int) -> int:
    """Records that a prompt of so many tokens has in each layer."""
    return tokens // PAGE_TOKENS if is_coded(pages) else -(-tokens // PAGE_TOKENS)


def rows_of(pages: PageFormat, tokens: int) -> int:
    """Its rows beside the records."""
    return tokens % PAGE_TOKENS if is_coded(pages) else 0


def row_bytes(pages: PageFormat) -> int:
    """Of the keys, or of the values, of one open row in one layer."""
    dtype: torch.dtype = getattr(torch, pages.open_code)
    return pages.kv_heads * pages.head_width * dtype.itemsize


class Prompt(NamedTuple):
    """Where an engine keeps the keys and values of a prompt."""

    pages: list[int]
    slot: int
    tokens: int


class Outlet(Protocol):
    """An engine's pages as a receiver wants them: for each layer, piece after piece, which stay as
    they are until the pages get another owner."""

    def records(
        self, layers: Sequence[int], prompt: Prompt, first: int, count: int
    ) -> list[list[memoryview]]:
        """Records `first : first + count` of a prompt."""
        ...

    def rows(self, layers: Sequence[int], prompt: Prompt) -> list[list[memoryview]]:
        """The keys, then the values, of its rows beside the records."""
        ...


class HostPages:
    """Pages in the memory of a CPU, as they are; an `Outlet` for receivers of the same format."""

    def __init__(self, pages: KVPages) -> None:
        self.format = page_format(pages)
        memory = pages.records if isinstance(pages, CodedPages) else pages.data
        self._records_LPB = _bytes(memory.flatten(2))
        self._open_L2RB: _Bytes | None = None
        if isinstance(pages, CodedPages):
            self._open_L2RB = _bytes(pages.open.flatten(3))

    def records(
        self, layers: Sequence[int], prompt: Prompt, first: int, count: int
    ) -> list[list[memoryview]]:
        runs = list(_runs(prompt.pages[first : first + count]))
        return [
            [self._records_LPB[layer, run:end].reshape(-1).data for run, end in runs]
            for layer in layers
        ]

    def rows(self, layers: Sequence[int], prompt: Prompt) -> list[list[memoryview]]:
        assert self._open_L2RB is not None
        first = prompt.slot * PAGE_TOKENS
        end = first + rows_of(self.format, prompt.tokens)
        return [
            [rows_RB.reshape(-1).data for rows_RB in self._open_L2RB[layer, :, first:end]]
            for layer in layers
        ]


def side_stream(pages: KVPages) -> torch.cuda.Stream | None:
    """A stream beside the engine's, for pages on a GPU. What little there is on it goes first, for
    steps under way would leave it no room until they end."""
    if pages.device.type != "cuda":
        return None
    return torch.cuda.Stream(pages.device, priority=-1)  # type: ignore[no-untyped-call]  # torch gives no type


def view(x: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the host."""
    return _bytes(x.flatten()).data


def _bytes(x: torch.Tensor) -> _Bytes:
    """The last axis as bytes."""
    found: _Bytes = x.view(torch.uint8).numpy()
    return found


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers: their first, and the one after their last."""
    if not pages:
        return
    first = pages[0]
    for page, following in pairwise(pages):
        if following != page + 1:
            yield first, page + 1
            first = following
    yield first, pages[-1] + 1
