"""Messages on a stream of bytes: each behind its length and checksums, so that no flipped bit makes
another message of it."""

from __future__ import annotations

import struct
import zlib

_HEAD = struct.Struct("<III")
"""Length of a message, CRC-32 of it, and CRC-32 of these two."""
_SUMMED = slice(0, 8)
HEAD_BYTES = _HEAD.size


class MessageError(ValueError):
    """Bytes that are no message, or not the one that was sent."""


def enclose(body: bytes) -> bytes:
    """The bytes of a message behind its head."""
    head = _HEAD.pack(len(body), zlib.crc32(body), 0)[_SUMMED]
    return head + zlib.crc32(head).to_bytes(4, "little") + body


def opened(arrived: memoryview, start: int, longest: int) -> tuple[memoryview, int] | None:
    """The message at `start` of what has arrived, and where the next one begins; None where it has
    not arrived whole. MessageError where there is none, or one of more than `longest` bytes."""
    begin = start + HEAD_BYTES
    if begin > len(arrived):
        return None
    head = arrived[start:begin]
    length, checksum, head_checksum = _HEAD.unpack(head)
    if zlib.crc32(head[_SUMMED]) != head_checksum:
        raise MessageError("its head is not what was sent")
    if length > longest:
        raise MessageError(f"{length} bytes are too long")
    end = begin + length
    if end > len(arrived):
        return None
    body = arrived[begin:end]
    if zlib.crc32(body) != checksum:
        raise MessageError("it is not what was sent")
    return body, end
