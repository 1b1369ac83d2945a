"""Bytes that lie in many places of this process's memory: copied, put together and taken apart.

A checksum or a copy of some hundred KiB lets other threads run meanwhile. One of a single page
keeps Python's lock, and where many streams compete for that lock, they do their work one after the
other. So a stream brings small pieces together, by one call, in memory of its own that stays in
the cache, and deals with them there.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Place = tuple[int, int]
"""Address and length of some bytes."""
_Rows = npt.NDArray[np.uint8]
_Index = npt.NDArray[np.int64]

_FEW_STREAMS = 2
"""So many get in each other's way less than it costs to bring pieces together."""
_SMALL_BYTES = 128 << 10
"""Below, Python's lock is kept: for some microseconds of work, to get it back costs more. xxhash
does the same below 100 KB."""
_LEAST_ROW = 1 << 10
"""Bytes that pieces must have in common to be copied as rows of an array."""


class Staging:
    """Memory of one stream, for payloads whose bytes lie in many places."""

    def __init__(self, streams: int) -> None:
        """`streams`: how many do their work at once in this process."""
        self._gathers = streams > _FEW_STREAMS
        self._memory = memoryview(b"")
        self._scattered: Sequence[Place] = ()
        """Where the bytes belong that are to be put here."""

    def room(self, length: int) -> memoryview:
        """So many bytes of it, the same each time."""
        if len(self._memory) < length:
            self._memory = memoryview(mmap.mmap(-1, length))
        return self._memory[:length]

    def collect(
        self, views: Sequence[memoryview], places: Sequence[Place] | None = None
    ) -> Sequence[memoryview]:
        """The bytes of views in as few pieces as that is worth: where they are or as a copy, which
        is good until the next call. `places`: theirs, if they are known."""
        if len(views) == 1 or not self._gathers:
            return views
        places = places or places_of(views)
        if len(places) == 1:
            return [_memory_at(places[0])]
        length = length_of(places)
        if length >= len(places) * _SMALL_BYTES:
            return views
        target = self.room(length)
        copy(places, [target])
        return [target]

    def target(self, views: Sequence[memoryview], sources: int) -> Sequence[memoryview]:
        """Where to put bytes for views that come from so many places; `deliver` follows."""
        self._scattered = ()
        if len(views) == 1 or not self._gathers:
            return views
        places = places_of(views)
        if len(places) == 1:
            return [_memory_at(places[0])]
        length = length_of(places)
        if length >= max(sources, len(places)) * _SMALL_BYTES:
            return views
        self._scattered = places
        return [self.room(length)]

    def deliver(self) -> None:
        """Puts what is in the last target into its views, where it is not there yet."""
        if self._scattered:
            _scatter(self.room(length_of(self._scattered)), self._scattered)


def address_of(view: memoryview) -> int:
    """The address of the first byte of a view that is not empty."""
    if view.readonly:
        return int(np.frombuffer(view, np.uint8).ctypes.data)
    return _address_of(_byte_of(view))


def places_of(views: Iterable[memoryview]) -> list[Place]:
    """Where the bytes of views lie, in order; neighbours in memory are one place."""
    found: list[Place] = []
    begin = end = 0
    for view in views:
        length = len(view)
        if not length:
            continue
        address = address_of(view) if view.readonly else _address_of(_byte_of(view))
        if address != end:
            if end:
                found.append((begin, end - begin))
            begin = address
        end = address + length
    if end:
        found.append((begin, end - begin))
    return found


def length_of(places: Iterable[Place]) -> int:
    """Bytes of places in all."""
    return sum([length for _, length in places])


def copy(sources: Sequence[Place], views: Sequence[memoryview]) -> None:
    """Copies memory to views of as many bytes in all."""
    if len(views) == 1 and (rows := _as_rows(sources)) is not None:
        array, index = rows
        out = np.frombuffer(views[0], np.uint8).reshape(-1, array.shape[1])
        np.take(array, index, axis=0, out=out, mode="clip")  # to raise would cost another copy
        return
    pieces = iter(sources)
    source, left = 0, 0
    for view in views:
        target, room = address_of(view), len(view)
        while room:
            if not left:
                source, left = next(pieces)
            count = min(room, left)
            _move(target, source, count)
            source, target, left, room = source + count, target + count, left - count, room - count


def _scatter(source: memoryview, places: Sequence[Place]) -> None:
    """Copies memory to places of as many bytes in all."""
    if (rows := _as_rows(places)) is not None:
        array, index = rows
        array[index] = np.frombuffer(source, np.uint8).reshape(-1, array.shape[1])
        return
    at = address_of(source)
    for address, length in places:
        _move(address, at, length)
        at += length


def _as_rows(places: Sequence[Place]) -> tuple[_Rows, _Index] | None:
    """An array of all memory from the first to the last of places, as rows of one size, and which
    rows they are, in order; None for places that are no such rows, or just one."""
    if len(places) < 2:
        return None
    addresses, lengths = zip(*places, strict=True)
    base, length = min(addresses), lengths[0]
    offsets = [address - base for address in addresses]
    alike = lengths.count(length) == len(lengths)
    size = math.gcd(*offsets, *((length,) if alike else lengths))
    if size < _LEAST_ROW:
        return None
    index = np.array(offsets) // size
    if not alike or length != size:
        counts = np.array(lengths) // size
        before = np.cumsum(counts) - counts
        index = np.repeat(index - before, counts) + np.arange(counts.sum())
    end = max(map(sum, places))
    return _array(base, ((end - base) // size, size)), index


def _move(target: int, source: int, length: int) -> None:
    move = ctypes.memmove if length >= _SMALL_BYTES else _move_small
    move(target, source, length)


class _At:
    """Memory as numpy takes it."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "typestr": "|u1",
        }


def _array(address: int, shape: tuple[int, ...]) -> _Rows:
    return np.asarray(_At(address, shape))


def _memory_at(place: Place) -> memoryview:
    """The bytes of a place, which must outlive what is returned."""
    address, length = place
    return _array(address, (length,)).data


_byte_of, _address_of = ctypes.c_char.from_buffer, ctypes.addressof

_move_small = ctypes.PyDLL(None).memmove
_move_small.restype = None
_move_small.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
