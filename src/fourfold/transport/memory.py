"""Bytes that lie in many places of this process's memory: copied, put together and taken apart.

A checksum or a copy of some hundred KiB lets other threads run meanwhile. One of a single page
keeps Python's lock, and where many streams compete for that lock, they do their work one after the
other. So a stream brings small pieces together, by one call, in memory of its own, and deals with
them there. What it copies it does in steps, for whose checksums the copy is still in the cache.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from fourfold.transport.frames import checksum

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
_STEP_BYTES = 512 << 10
"""So many are copied before their checksum is taken."""


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

    def checksum(self, views: Sequence[memoryview], places: Sequence[Place]) -> int:
        """That of views, whose places these are."""
        if self._gathers and _are_small(places) and (unit := _unit(places)) >= _LEAST_ROW:
            return self._copy_rows(places, (), unit)
        return checksum([_memory_at(place) for place in places] if self._gathers else views)

    def collect(self, views: Sequence[memoryview]) -> tuple[Sequence[memoryview], int]:
        """The bytes of views in as few pieces as that is worth: where they are or as a copy, which
        is good until the next call. And their checksum."""
        if len(views) == 1 or not self._gathers:
            return views, checksum(views)
        places = places_of(views)
        if len(places) == 1:
            views = [_memory_at(places[0])]
        elif _are_small(places):
            target = self.room(length_of(places))
            return [target], self.copy(places, [target])
        return views, checksum(views)

    def copy(self, sources: Sequence[Place], views: Sequence[memoryview]) -> int:
        """Copies memory to views of as many bytes in all; returns the checksum of the copy."""
        self._scattered = ()
        if self._gathers or len(views) == 1:
            places = places_of(views)
            unit = math.gcd(_unit(sources), _unit(places))
            if unit >= _LEAST_ROW and (_are_small(sources) or _are_small(places)):
                return self._copy_rows(sources, places, unit)
        return _copy_pieces(sources, views)

    def target(self, views: Sequence[memoryview]) -> Sequence[memoryview]:
        """Where to put bytes for views; `deliver` follows."""
        self._scattered = ()
        if len(views) == 1 or not self._gathers:
            return views
        places = places_of(views)
        if len(places) == 1:
            return [_memory_at(places[0])]
        if not _are_small(places):
            return views
        self._scattered = places
        return [self.room(length_of(places))]

    def deliver(self) -> None:
        """Puts what is in the last target into its views, where it is not there yet."""
        if self._scattered:
            _scatter(self.room(length_of(self._scattered)), self._scattered)

    def _copy_rows(self, sources: Sequence[Place], places: Sequence[Place], unit: int) -> int:
        """As `copy`, to places or nowhere, all of them multiples of a unit of bytes."""
        array, index = _as_rows(sources, unit)
        target, at = _as_rows(places, unit) if places else (array, index)
        state, step = xxhash.xxh3_64(), max(1, _STEP_BYTES // unit)
        if len(places) != 1:
            room = np.frombuffer(self.room(step * unit), np.uint8).reshape(step, unit)
        for begin in range(0, len(index), step):
            rows = index[begin : begin + step]
            out = target[begin : begin + step] if len(places) == 1 else room[: len(rows)]
            # Clipped, for to raise would cost another copy.
            np.take(array, rows, axis=0, out=out, mode="clip")
            state.update(out.data)
            if len(places) > 1:
                target[at[begin : begin + step]] = out
        return state.intdigest()


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


def _copy_pieces(sources: Sequence[Place], views: Sequence[memoryview]) -> int:
    """See `Staging.copy`."""
    state, pieces = xxhash.xxh3_64(), iter(sources)
    source, left = 0, 0
    for view in views:
        target, done = address_of(view), 0
        while done < len(view):
            if not left:
                source, left = next(pieces)
            count = min(len(view) - done, left, _STEP_BYTES)
            _move(target + done, source, count)
            state.update(view[done : done + count])
            source, done, left = source + count, done + count, left - count
    return state.intdigest()


def _scatter(source: memoryview, places: Sequence[Place]) -> None:
    """Copies memory to places of as many bytes in all."""
    if (unit := _unit(places)) >= _LEAST_ROW:
        array, index = _as_rows(places, unit)
        array[index] = np.frombuffer(source, np.uint8).reshape(-1, unit)
        return
    at = address_of(source)
    for address, length in places:
        _move(address, at, length)
        at += length


def _are_small(places: Sequence[Place]) -> bool:
    """Whether they are many, and better dealt with together."""
    return len(places) > 1 and length_of(places) < len(places) * _SMALL_BYTES


def _unit(places: Sequence[Place]) -> int:
    """The most bytes that the lengths of places and their distances are multiples of."""
    base = places[0][0]
    return math.gcd(*[address - base for address, _ in places], *[length for _, length in places])


def _as_rows(places: Sequence[Place], unit: int) -> tuple[_Rows, _Index]:
    """An array of all memory from the first to the last of places, as rows of so many bytes, and
    which rows they are, in order."""
    addresses, lengths = np.array(places).T
    base = int(addresses.min())
    index, counts = (addresses - base) // unit, lengths // unit
    if counts.max() > 1:
        before = np.cumsum(counts) - counts
        index = np.repeat(index - before, counts) + np.arange(counts.sum())
    return _array(base, (int(index.max()) + 1, unit)), index


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
