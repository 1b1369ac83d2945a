"""What both sides have in memory of the host, and who they say they are."""

from __future__ import annotations

import contextlib
import mmap
import random
from collections.abc import Iterator, Sequence
from unittest import mock

from fourfold.bench.transport.config import LAYERS
from fourfold.transport import Identity, PageFormat, Part
from fourfold.transport.frames import checksum


class Pages:
    """Pages of all layers: what is sent, and where it lands. Runs of `run_pages` pages lie one
    after the other, the runs in random order."""

    layers = LAYERS
    open = False

    def __init__(
        self, pages: int, page_bytes: int, run_pages: int, buffer: memoryview, seed: int
    ) -> None:
        self.pages = pages
        self._buffer, self._page_bytes = buffer, page_bytes
        count = len(buffer) // page_bytes
        runs = [range(at, min(at + run_pages, count)) for at in range(0, count, run_pages)]
        random.Random(seed).shuffle(runs)
        self._order = [page for run in runs for page in run]

    def landed(self, part: Part, layer: int, layers: int, first: int, count: int) -> int:
        """Nothing more is to be done with a run, which is pages."""
        return 0

    def views(self, part: Part, layer: int, first: int, count: int) -> Sequence[memoryview]:
        """See `Landing`. Neighbours in memory are one piece, as in an engine."""
        start = layer * self.pages + first
        return self._pieces(self._order[start : start + count])

    def digest(self) -> int:
        """Checksum of all pages in their order."""
        return checksum(self._pieces(self._order))

    def _pieces(self, order: Sequence[int]) -> list[memoryview]:
        found, size = [], self._page_bytes
        begin = end = order[0]
        for page in [*order, -1]:
            if page != end:
                found.append(self._buffer[begin * size : end * size])
                begin = page
            end = page + 1
        return found


def identity(name: str, epoch: int, page_bytes: int) -> Identity:
    """Who a side of the benchmark says it is."""
    pages = PageFormat(
        layers=LAYERS,
        kv_heads=1,
        head_width=1,
        page_tokens=64,
        code="int8",
        open_code="bfloat16",
        record_bytes=page_bytes,
    )
    return Identity(name=name, epoch=epoch, model="benchmark", pages=pages)


def private_memory(size: int) -> memoryview:
    """Memory of this process that has been touched."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, mmap.PAGESIZE):
        memory[at] = 1
    return memoryview(memory)


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """Takes every checksum of a payload for 0: only to see what they cost."""
    with mock.patch("xxhash.xxh3_64", _NoChecksum):
        yield


class _NoChecksum:
    def update(self, view: memoryview) -> None:
        pass

    def intdigest(self) -> int:
        return 0
