"""Copies between many places of memory are what copies byte by byte would be."""

from __future__ import annotations

import mmap
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.transport.frames import checksum
from fourfold.transport.memory import Staging, length_of, places_of

UNITS = [1, 7, 1024, 1040, 4096, 65536, 200_000]
"""Bytes that all pieces of a layout are multiples of."""


def cut(
    buffer: memoryview, unit: int, counts: list[int], chance: random.Random
) -> list[memoryview]:
    """Pieces of so many units each, in random order, from all over a buffer."""
    pieces, at = [], chance.randrange(unit)
    for count in counts:
        at += unit * chance.randint(0, 2)
        pieces.append(buffer[at : at + unit * count])
        at += unit * count
    chance.shuffle(pieces)
    return pieces


def memory(unit: int, counts: list[int]) -> memoryview:
    return memoryview(bytearray(unit * (sum(counts) + 2 * len(counts) + 1)))


layouts = st.tuples(
    st.sampled_from(UNITS), st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers()
)


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@settings(deadline=None)
@given(layouts)
def test_bytes_come_through_a_stream(streams: int, layout: tuple[int, list[int], int]) -> None:
    """From pieces here to other pieces there, as a sender and a receiver take and put them."""
    unit, counts, seed = layout
    chance = random.Random(seed)
    source, target = memory(unit, counts), memory(unit, counts)
    source[:] = chance.randbytes(len(source))
    here = cut(source, unit, counts, chance)
    chance.shuffle(counts)
    there = cut(target, unit, counts, chance)
    sender, receiver = Staging(streams), Staging(streams)
    pieces, found = sender.collect(here)
    assert b"".join(pieces) == b"".join(here)
    assert found == Staging(streams).checksum(here, places_of(here)) == checksum(here)
    for source_places in (places_of(pieces), places_of(here)):
        assert receiver.copy(source_places, there) == found
        assert b"".join(there) == b"".join(here)
        for view in there:
            view[:] = bytes(len(view))
    at = 0
    for view in (arrived := receiver.target(there)):
        view[:] = b"".join(here)[at : at + len(view)]
        at += len(view)
    assert at == length_of(places_of(arrived))
    receiver.deliver()
    assert b"".join(there) == b"".join(here)
    untouched = bytearray(target)
    for view in there:
        view[:] = bytes(len(view))
        at = places_of([view])[0][0] - places_of([target])[0][0]
        untouched[at : at + len(view)] = bytes(len(view))
    assert not any(untouched)


def test_neighbours_are_one_place() -> None:
    buffer = memoryview(mmap.mmap(-1, 1 << 16))
    views = [buffer[:100], buffer[100:100], buffer[100:4096], buffer[5000:5001], buffer[4096:5000]]
    (begin, first), (_, second), (_, third) = places = places_of(views)
    assert [place[0] - begin for place in places] == [0, 5000, 4096]
    assert [first, second, third] == [4096, 1, 904]
    assert length_of(places) == 5001


def test_small_pieces_are_gathered_by_many_streams_only() -> None:
    buffer = memoryview(bytearray(1 << 20))
    small = [buffer[at : at + 4096] for at in range(0, 1 << 16, 8192)]
    large = [buffer[: 1 << 18], buffer[1 << 19 :]]
    assert len(Staging(2).collect(small)[0]) == len(small)
    assert len(Staging(3).collect(small)[0]) == 1
    assert Staging(8).collect(large)[0] == large
    assert len(Staging(2).target(small)) == len(small)
    assert len(Staging(3).target(small)) == 1
    assert Staging(8).target(large) == large


def test_bytes_that_lie_together_are_dealt_with_in_place() -> None:
    buffer = memoryview(bytearray(b"abcdef"))
    staging = Staging(8)
    (piece,), _ = staging.collect([buffer[1:3], buffer[3:5]])
    (target,) = staging.target([buffer[1:3], buffer[3:5]])
    target[:] = b"wxyz"
    staging.deliver()
    assert bytes(piece) == b"wxyz"
    assert bytes(buffer) == b"awxyzf"


def test_what_can_only_be_read_is_collected_too() -> None:
    views = [memoryview(b"ab" * 1024), memoryview(b"cd" * 1024)]
    (piece,), found = Staging(8).collect(views)
    assert found == checksum(views)
    assert piece == b"ab" * 1024 + b"cd" * 1024
