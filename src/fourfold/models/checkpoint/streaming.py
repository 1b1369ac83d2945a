"""Reading parts of files into a GPU's memory as fast as the disk or the bus allows.

Threads read pieces of a chunk into one of a few pinned buffers while the buffers before it are on
their way to the GPU, on a stream of their own. Neighbouring tensors travel together: a checkpoint
of many experts has tens of thousands of small ones. Memory is bounded by the buffers, whatever the
size of the files; who falls behind, disk, bus or whoever uses the tensors, holds up the others.
"""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from fourfold.errors import CheckpointError

_CHUNK = 64 << 20
_READ = 8 << 20
_BUFFERS = 4
_THREADS = 16
# What lies between two parts that are read together, at most.
_GAP = 1 << 20
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True, order=True)
class FilePart:
    """Some bytes of a file."""

    file: Path
    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Parts that are read together: the bytes `start : end` of a file, and which parts those hold,
    by their places in the list that was asked for."""

    file: Path
    start: int
    end: int
    parts: tuple[int, ...]


def plan_chunks(parts: Sequence[FilePart], limit: int) -> list[Chunk]:
    """Cuts what is to be read into chunks of at most `limit` bytes, in the order of the files; a
    part that is longer is a chunk of its own."""
    chunks: list[Chunk] = []
    for place in sorted(range(len(parts)), key=lambda place: parts[place]):
        part = parts[place]
        last = chunks[-1] if chunks else None
        if (
            last is not None
            and last.file == part.file
            and part.start - last.end <= _GAP
            and part.end - last.start <= limit
        ):
            end = max(last.end, part.end)
            chunks[-1] = dataclasses.replace(last, end=end, parts=(*last.parts, place))
        else:
            # Numbers stay aligned to their size as far as they are in the file.
            start = part.start // _ALIGNMENT * _ALIGNMENT
            chunks.append(Chunk(part.file, start, part.end, (place,)))
    return chunks


class StreamingReader:
    """Reads parts of files to one device. On a CPU it does the same with ordinary memory."""

    def __init__(self, device: torch.device, *, chunk_bytes: int = _CHUNK) -> None:
        self.device = device
        self._limit = chunk_bytes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="read weights")
        self._buffers = deque(_Buffer(chunk_bytes + _ALIGNMENT, device) for _ in range(_BUFFERS))
        self._copies = _stream(device)

    def read(self, parts: Sequence[FilePart]) -> Iterator[tuple[int, Tensor]]:
        """The bytes of each part, uint8 on the device, with its place in the list; in the order of
        the files.

        A tensor may be used by what is enqueued on the current stream before the next is asked for,
        and not after that. Raises `CheckpointError` where a file ends too early.
        """
        chunks = plan_chunks(parts, self._limit)
        with ExitStack() as opened:
            files = {chunk.file: opened.enter_context(chunk.file.open("rb")) for chunk in chunks}
            pieces = (
                _Piece(chunk, start, min(chunk.end, start + self._buffers[0].size))
                for chunk in chunks
                for start in range(chunk.start, chunk.end, self._buffers[0].size)
            )
            for chunk, whole in self._arrived(pieces, files):
                for place in chunk.parts:
                    start = parts[place].start - chunk.start
                    yield place, whole[start : start + parts[place].nbytes]

    def _arrived(
        self, pieces: Iterator[_Piece], files: Mapping[Path, BinaryIO]
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """Each chunk's bytes on the device; the next pieces are read meanwhile."""
        reading = deque(self._start(piece, files) for piece in islice(pieces, _BUFFERS - 1))
        whole: Tensor | None = None
        while reading:
            piece, buffer, reads = reading.popleft()
            for read in reads:
                read.result()
            if whole is None:
                whole = self._room_for(piece, buffer)
            at = piece.start - piece.chunk.start
            self._copy(buffer, whole[at : at + piece.nbytes])
            reading.extend(self._start(piece, files) for piece in islice(pieces, 1))
            if piece.end == piece.chunk.end:
                yield piece.chunk, whole
                buffer.used = _mark(self.device)
                whole = None

    def _start(self, piece: _Piece, files: Mapping[Path, BinaryIO]) -> _Reading:
        """Starts reading a piece into the buffer that has been left alone longest."""
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        if buffer.copied is not None:
            buffer.copied.synchronize()
        file = files[piece.chunk.file]
        reads = [
            self._threads.submit(
                _read, file, piece.start + at, buffer.bytes[at : min(at + _READ, piece.nbytes)]
            )
            for at in range(0, piece.nbytes, _READ)
        ]
        return _Reading(piece, buffer, reads)

    def _room_for(self, piece: _Piece, buffer: _Buffer) -> Tensor:
        """Device memory for the chunk that a piece is the first of."""
        size = piece.chunk.end - piece.chunk.start
        if size <= buffer.size:
            if self._copies is not None and buffer.used is not None:
                self._copies.wait_event(buffer.used)
            return buffer.on_device[:size]
        whole = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self._copies is not None:
            # What had this memory before may still be in use.
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        return whole

    def _copy(self, buffer: _Buffer, target: Tensor) -> None:
        source = buffer.on_host[: len(target)]
        if self._copies is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            buffer.copied = _mark(self.device)
        torch.cuda.current_stream(self.device).wait_stream(self._copies)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What is read into one buffer: bytes `start : end` of the file of a chunk."""

    chunk: Chunk
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class _Buffer:
    """Memory on the host, pinned if that is of use, and as much on the device. `copied` is when the
    first was copied, `used` when the second was used (None: never, or on a CPU)."""

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.size = size
        self.on_host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        self.bytes = self.on_host.numpy().data
        self.on_device = torch.empty(size, dtype=torch.uint8, device=device)
        self.copied: torch.cuda.Event | None = None
        self.used: torch.cuda.Event | None = None


class _Reading(NamedTuple):
    piece: _Piece
    buffer: _Buffer
    reads: list[Future[None]]


def _read(file: BinaryIO, start: int, target: memoryview) -> None:
    """Fills `target` with the bytes of a file from `start` on."""
    while len(target):
        count = os.preadv(file.fileno(), [target], start)
        if count == 0:
            raise CheckpointError(f"{file.name} ends too early; fetch it again")
        start, target = start + count, target[count:]


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """When the current stream will be where it is now."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
