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

STEP_BYTES = 64 << 20
"""Of pages at most that are copied at once, on a device beside those it keeps."""


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


class Prompt(NamedTuple):
    """Where an engine keeps the keys and values of a prompt."""

    pages: list[int]
    slot: int
    tokens: int


class Outlet(Protocol):
    """An engine's pages as a receiver wants them: for each layer, piece after piece, which stay as
    they are until the pages get another owner."""

    @property
    def record_bytes(self) -> int:
        """What handing out a record takes, of memory beside the pages."""
        ...

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

    record_bytes = 0

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
        found = list(runs(prompt.pages[first : first + count]))
        return [
            [self._records_LPB[layer, run].reshape(-1).data for run in found] for layer in layers
        ]

    def rows(self, layers: Sequence[int], prompt: Prompt) -> list[list[memoryview]]:
        assert self._open_L2RB is not None
        first = prompt.slot * PAGE_TOKENS
        end = first + rows_of(self.format, prompt.tokens)
        return [
            [rows_RB.reshape(-1).data for rows_RB in self._open_L2RB[layer, :, first:end]]
            for layer in layers
        ]


def in_steps(
    layers: Sequence[int], first: int, end: int, record_bytes: int
) -> Iterator[tuple[Sequence[int], int, int]]:
    """Records `first : end` of some layers, in steps of `STEP_BYTES` at most, but of one record at
    least: as many layers as fit, or one layer's records in parts."""
    fit = max(1, STEP_BYTES // max(1, record_bytes))
    records = max(1, min(fit, end - first))
    together = fit // records
    for place in range(0, len(layers), together):
        for begin in range(first, end, records):
            yield layers[place : place + together], begin, min(begin + records, end)


def runs(numbers: Sequence[int]) -> Iterator[slice]:
    """Numbers as runs of consecutive ones."""
    if not numbers:
        return
    first = numbers[0]
    for number, following in pairwise(numbers):
        if following != number + 1:
            yield slice(first, number + 1)
            first = following
    yield slice(first, numbers[-1] + 1)


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
