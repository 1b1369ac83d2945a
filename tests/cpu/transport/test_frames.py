"""The header of a frame: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.transport.frames import (
    EXTENT_BYTES,
    HEADER_BYTES,
    Extent,
    FrameError,
    Header,
    Kind,
    checksum,
    decode_extents,
    decode_header,
    encode_extents,
    encode_header,
)
from fourfold.transport.pieces import Part

LIMIT = 8 << 20
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    layer = draw(st.integers(0, 2**16 - 1))
    kind = draw(st.sampled_from(Kind))
    described = kind in (Kind.DESCRIBED, Kind.DESCRIBED_PROBE)
    length = draw(st.integers(1, LIMIT))
    split = draw(st.booleans())
    offset = draw(st.integers(0, 2**31)) if split else 0
    return Header(
        kind=kind,
        epoch=draw(U64),
        lease=draw(U64),
        part=draw(st.sampled_from(Part)),
        layer=layer,
        layers=1 if split else draw(st.integers(1, 2**16 - layer)) if layer else 1,
        first=draw(U32),
        count=1 if split else draw(st.integers(1, 2**32 - 1)),
        length=length,
        checksum=draw(U64),
        offset=offset,
        size=offset + length + draw(st.integers(0, 9)) if split else 0,
        extents=draw(st.integers(1, 4096)) if described else 0,
    )


@settings(deadline=None)
@given(headers())
def test_a_header_comes_back(header: Header) -> None:
    data = encode_header(header)
    assert len(data) == HEADER_BYTES == 64
    assert decode_header(data, LIMIT) == header


@settings(deadline=None)
@given(headers(), st.integers(0, 8 * HEADER_BYTES - 1))
def test_a_flipped_bit_is_found(header: Header, bit: int) -> None:
    data = bytearray(encode_header(header))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        decode_header(data, LIMIT)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_header(data, LIMIT)


@settings(deadline=None)
@given(st.binary(min_size=55, max_size=55))
def test_what_decodes_despite_nonsense_is_sensible(body: bytes) -> None:
    """Even with the right beginning and checksum a header says nothing that must not be."""
    data = struct.pack("<IB", 0x34464C44, 1) + body
    data += struct.pack("<I", zlib.crc32(data))
    try:
        header = decode_header(data, LIMIT)
    except FrameError:
        return
    assert 1 <= header.length <= LIMIT
    assert encode_header(header) == data


def test_a_longer_payload_than_allowed_is_refused() -> None:
    header = Header(
        kind=Kind.DATA,
        epoch=1,
        lease=2,
        part=Part.PAGES,
        layer=0,
        layers=1,
        first=0,
        count=1,
        length=1001,
        checksum=0,
    )
    with pytest.raises(FrameError, match="1001 bytes"):
        decode_header(encode_header(header), 1000)


@settings(deadline=None)
@given(st.lists(st.tuples(U32, st.integers(1, 1000), U64), min_size=1, max_size=20))
def test_extents_come_back(fields: list[tuple[int, int, int]]) -> None:
    extents = [Extent(*values) for values in fields]
    data = encode_extents(extents)
    assert len(data) == EXTENT_BYTES * len(extents)
    length = sum(extent.length for extent in extents)
    assert decode_extents(data, length) == extents
    with pytest.raises(FrameError):
        decode_extents(data, length + 1)


@settings(deadline=None)
@given(st.binary(max_size=100), st.integers(0, 100))
def test_a_checksum_does_not_depend_on_cuts(data: bytes, cut: int) -> None:
    view = memoryview(data)
    assert checksum([view[:cut], view[cut:]]) == checksum([view])
