"""How the runs of transfers become frames: whole pages up to a size, short runs of many layers in
one, and only giant pages in parts."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

from fourfold.transport.pieces import Part, Piece

Transfer = TypeVar("Transfer")
"""Whose runs they are; here only told apart."""
_MAX_LAYERS, _MAX_PAGES = 1 << 16, 1 << 32
SPLIT_BYTES = 1 << 20
"""A page of more is sent in parts."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slice(Generic[Transfer]):
    """What one frame carries; the names are those of its header."""

    transfer: Transfer
    part: Part
    layer: int
    layers: int
    first: int
    count: int
    length: int
    views: list[memoryview]
    offset: int = 0
    size: int = 0


class _Run(Generic[Transfer]):
    """A piece and how much of it has been cut off."""

    def __init__(self, transfer: Transfer, piece: Piece) -> None:
        self.transfer, self.piece = transfer, piece
        self.views = [
            view.cast("B") if view.format != "B" or view.ndim != 1 else view for view in piece.data
        ]
        sizes = list(map(len, self.views))
        self.bytes = sum(sizes)
        count = piece.count
        if count < 1 or not self.bytes or self.bytes % count:
            raise ValueError(f"{self.bytes} bytes are not {count} pages of one size")
        if not 0 <= piece.layer < _MAX_LAYERS or not 0 <= piece.first <= _MAX_PAGES - count:
            raise ValueError(f"layer {piece.layer}, page {piece.first} cannot be in a frame")
        if piece.part is Part.OPEN and (piece.first, count) != (0, 1):
            raise ValueError("open rows are one run a layer")
        self.page_bytes = self.bytes // count
        self.pages = 0
        """Cut off already."""
        self.offset = 0
        """Bytes cut off the page after those."""
        self._view_bytes = sizes[0] if sizes.count(sizes[0]) == len(sizes) else 0
        """Of every view; 0 where they differ."""
        self._view = 0
        """The first that has not been taken whole."""
        self._taken = 0
        """Bytes of that one that have been."""

    def take(self, length: int) -> list[memoryview]:
        """Cuts off the next bytes."""
        if self._view_bytes and not self._taken and not length % self._view_bytes:
            begin = self._view
            self._view += length // self._view_bytes
            return self.views[begin : self._view]
        taken = []
        while length:
            view = self.views[self._view]
            part = view[self._taken : self._taken + length]
            self._taken += len(part)
            if self._taken == len(view):
                self._view, self._taken = self._view + 1, 0
            if len(part):
                taken.append(part)
            length -= len(part)
        return taken


class Cutter(Generic[Transfer]):
    """Runs that wait, in order, and the frames they are cut into. For one thread at a time."""

    def __init__(self, slice_bytes: int) -> None:
        self.slice_bytes = slice_bytes
        self._runs: collections.deque[_Run[Transfer]] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, transfer: Transfer, pieces: Sequence[Piece]) -> int:
        """Queues runs and returns their bytes. Raises `ValueError` where one makes no sense."""
        runs = [_Run(transfer, piece) for piece in pieces]
        self._runs.extend(runs)
        return sum(run.bytes for run in runs)

    def drop(self, transfer: Transfer) -> None:
        """Takes a transfer's runs out."""
        self._runs = collections.deque(run for run in self._runs if run.transfer is not transfer)

    def cut(self) -> Slice[Transfer]:
        """The next frame; there must be a run."""
        run = self._runs[0]
        if run.page_bytes > SPLIT_BYTES:
            return self._cut_page(run)
        piece = run.piece
        fit = max(1, self.slice_bytes // run.page_bytes)
        count = min(fit, piece.count - run.pages)
        views = run.take(count * run.page_bytes)
        first, layers = piece.first + run.pages, 1
        run.pages += count
        if run.pages == piece.count:
            self._runs.popleft()
            if count == piece.count:
                layers += self._join(run, views)
        return Slice(
            transfer=run.transfer,
            part=piece.part,
            layer=piece.layer,
            layers=layers,
            first=first,
            count=count,
            length=layers * count * run.page_bytes,
            views=views,
        )

    def _join(self, run: _Run[Transfer], views: list[memoryview]) -> int:
        """Adds the same pages of the layers that follow, while they fit; how many layers."""
        piece, joined = run.piece, 0
        while self._runs:
            other = self._runs[0]
            more = other.piece
            if (
                other.transfer is not run.transfer
                or (more.part, more.first, more.count) != (piece.part, piece.first, piece.count)
                or more.layer != piece.layer + joined + 1
                or other.bytes != run.bytes
                or (joined + 2) * run.bytes > self.slice_bytes
            ):
                break
            views += other.take(other.bytes)
            self._runs.popleft()
            joined += 1
        return joined

    def _cut_page(self, run: _Run[Transfer]) -> Slice[Transfer]:
        """A part of a page that is too large for one frame."""
        piece, offset = run.piece, run.offset
        length = min(self.slice_bytes, run.page_bytes - offset)
        views = run.take(length)
        page = piece.first + run.pages
        run.offset += length
        if run.offset == run.page_bytes:
            run.offset = 0
            run.pages += 1
            if run.pages == piece.count:
                self._runs.popleft()
        return Slice(
            transfer=run.transfer,
            part=piece.part,
            layer=piece.layer,
            layers=1,
            first=page,
            count=1,
            length=length,
            views=views,
            offset=offset,
            size=run.page_bytes,
        )
