"""The header before every payload on a data stream: 64 bytes, little-endian, with a checksum.

Pure functions. A header that does not decode is a reason to close its connection: what follows it
cannot be told apart any more.
"""

from __future__ import annotations

import enum
import itertools
import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import msgspec
import xxhash

from fourfold.transport.pieces import Part

MAGIC = 0x34464C44
"""DLF4 on the wire."""
VERSION = 1
_BODY = struct.Struct("<IBBBBQQHHIIIIIQHH")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _BODY.size + _CHECK.size
_EXTENT = struct.Struct("<IIQ")
EXTENT_BYTES = _EXTENT.size
MAX_EXTENTS = 4096
"""Pieces of memory that one frame may name."""
_MAX_LAYERS = 1 << 16


class Kind(enum.IntEnum):
    """What follows a header."""

    DATA = 1
    """The payload."""
    DESCRIBED = 2
    """Where the payload lies in memory of the sender that the receiver reads: `extents` pieces."""
    PROBE = 3
    """A payload that nobody wants, to time the path."""
    DESCRIBED_PROBE = 4


class FrameError(Exception):
    """Bytes that are not a frame of ours; `str(error)` says what is wrong with them."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Which pages of which lease a payload is, and what it must hash to."""

    kind: Kind
    epoch: int
    """The receiver's incarnation."""
    lease: int
    part: Part
    layer: int
    layers: int
    """The same pages of so many layers, one after the other."""
    first: int
    count: int
    length: int
    """Bytes of the payload."""
    checksum: int
    """xxh3_64 of the payload."""
    offset: int = 0
    size: int = 0
    """Of the page whose bytes `offset : offset + length` these are; 0 where pages are whole."""
    extents: int = 0


class Extent(NamedTuple):
    """A piece of a payload in memory of its sender that the receiver reads."""

    region: int
    length: int
    offset: int


Fields = tuple[int, int, int]
"""Those of an `Extent`: there are many, and a tuple is made in a third of the time."""


def encode_header(header: Header) -> bytes:
    """The 64 bytes of a header."""
    body = _BODY.pack(
        MAGIC,
        VERSION,
        header.kind,
        header.part,
        0,
        header.epoch,
        header.lease,
        header.layer,
        header.layers,
        header.first,
        header.count,
        header.length,
        header.offset,
        header.size,
        header.checksum,
        header.extents,
        0,
    )
    return body + _CHECK.pack(zlib.crc32(body))


def decode_header(data: bytes | bytearray | memoryview, max_payload: int) -> Header:
    """A header of 64 bytes. Raises `FrameError` unless it is whole, of this version and sensible,
    with at most `max_payload` bytes to follow."""
    if len(data) != HEADER_BYTES:
        raise FrameError(f"a header has {HEADER_BYTES} bytes, not {len(data)}")
    magic, version, kind, part, flags, epoch, lease, *rest = _BODY.unpack_from(data)
    layer, layers, first, count, length, offset, size, checksum, extents, reserved = rest
    if magic != MAGIC:
        raise FrameError(f"it begins with {magic:#010x}, not with {MAGIC:#010x}")
    if version != VERSION:
        raise FrameError(f"it is of version {version}, this side speaks {VERSION}")
    (check,) = _CHECK.unpack_from(data, _BODY.size)
    if check != zlib.crc32(memoryview(data)[: _BODY.size]):
        raise FrameError("the checksum of its header is wrong")
    if kind >= len(_KINDS) or not kind or part >= len(_PARTS) or flags or reserved:
        raise FrameError(f"kind {kind}, part {part} or flags {flags} mean nothing")
    if not 1 <= length <= max_payload:
        raise FrameError(f"its payload of {length} bytes is not within 1 to {max_payload}")
    if layers == 0 or layer + layers > _MAX_LAYERS or count == 0:
        raise FrameError(f"{layers} layers from {layer} of {count} pages are no run")
    one = layers == 1 and count == 1 and offset + length <= size
    if not (one if size else offset == 0):
        raise FrameError(f"bytes from {offset} on, {length} of them, are no part of {size}")
    described = kind in (Kind.DESCRIBED, Kind.DESCRIBED_PROBE)
    if described != (extents > 0) or extents > MAX_EXTENTS:
        raise FrameError(f"{extents} pieces of memory do not suit kind {kind}")
    return Header(
        kind=_KINDS[kind],
        epoch=epoch,
        lease=lease,
        part=_PARTS[part],
        layer=layer,
        layers=layers,
        first=first,
        count=count,
        length=length,
        checksum=checksum,
        offset=offset,
        size=size,
        extents=extents,
    )


def encode_extents(extents: Iterable[Fields]) -> bytes:
    """What follows the header of a described payload."""
    return b"".join(itertools.starmap(_EXTENT.pack, extents))


def decode_extents(data: bytes | bytearray | memoryview, length: int) -> list[Fields]:
    """The pieces of a payload of `length` bytes. Raises `FrameError` where they are not that."""
    extents: list[Fields] = list(_EXTENT.iter_unpack(data))
    lengths = [size for _, size, _ in extents]
    total = sum(lengths)
    if total != length or not all(lengths):
        raise FrameError(f"its pieces of memory have {total} bytes, its payload {length}")
    return extents


def checksum(views: Iterable[memoryview]) -> int:
    """xxh3_64 of views one after the other. Lets other threads run while it reads large ones."""
    state = xxhash.xxh3_64()
    for view in views:
        state.update(view)
    return state.intdigest()


_KINDS = (Kind.DATA, *Kind)
"""By number, from 1 on; quicker than to ask the enumeration."""
_PARTS = tuple(Part)
