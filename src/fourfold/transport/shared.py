"""Memory that processes of one host share: its owner writes, others map it to read.

Where a peer's pages lie in such memory, a frame only says where, and the receiver copies them
itself. The checksum is taken of the copy, so it also shows that the sender has not used the memory
for something else meanwhile.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Container, Sequence
from typing import NamedTuple

from fourfold.transport.control import Region
from fourfold.transport.frames import MAX_EXTENTS, Fields, FrameError
from fourfold.transport.memory import Place, address_of
from fourfold.transport.sources import Fill
from fourfold.transport.stats import SHARED_MEMORY

_NO_END = 1 << 64
"""Above all addresses."""
_PROT_READ, _MAP_SHARED = 1, 1
_FAILED = ctypes.c_void_p(-1).value


class MappingError(Exception):
    """A peer's memory that cannot be mapped; `str(error)` says why and what would help."""


class SharedRegion:
    """A piece of memory, zeros at first. Where the system allows, others can map it to read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor: int | None = None
        """None where the system shares no memory this way: then pages go over TCP."""
        if hasattr(os, "memfd_create"):
            flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
            self.descriptor = os.memfd_create("fourfold-pages", flags)
            os.ftruncate(self.descriptor, size)
            # Its size is fixed, so that a reader's mapping never loses its memory.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            weakref.finalize(self, os.close, self.descriptor)
        self.buffer = memoryview(
            mmap.mmap(-1 if self.descriptor is None else self.descriptor, size)
        )
        """Writable. The memory lives as long as any view of it, and can be mapped for as long as
        this object lives."""
        self.address = address_of(self.buffer)


class Regions:
    """The regions of one node, by number; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._regions: list[SharedRegion] = []
        self._sorted: list[tuple[int, int, int]] = []
        """Begin, end and number of each, by address."""

    def add(self, region: SharedRegion) -> int:
        """Returns the region's number."""
        with self._lock:
            number = len(self._regions)
            self._regions.append(region)
            bisect.insort(self._sorted, (region.address, region.address + region.size, number))
            return number

    def offers(self) -> list[Region]:
        """What others need to map them."""
        with self._lock:
            return [
                Region(
                    number=number,
                    process=os.getpid(),
                    descriptor=region.descriptor,
                    inode=os.fstat(region.descriptor).st_ino,
                    size=region.size,
                )
                for number, region in enumerate(self._regions)
                if region.descriptor is not None
            ]

    def __getitem__(self, number: int) -> SharedRegion:
        return self._regions[number]

    def find(self, places: Sequence[Place], known: Container[int]) -> list[Fields] | None:
        """Which parts of regions places are, if all of them are in regions that are known to the
        reader."""
        found: list[Fields] = []
        begin = end = number = 0
        for address, length in places:
            while length:  # again where a place goes from one region into the next
                if not begin <= address < end:
                    index = bisect.bisect_right(self._sorted, (address, _NO_END, 0)) - 1
                    if index < 0:
                        return None
                    begin, end, number = self._sorted[index]
                    if address >= end or number not in known:
                        return None
                part = length if address + length <= end else end - address
                found.append((number, part, address - begin))
                address, length = address + part, length - part
        return found if len(found) <= MAX_EXTENTS else None


class _Mapping(NamedTuple):
    address: int
    size: int


_NOTHING = _Mapping(0, 0)


class Mappings:
    """A peer's regions in this process, read only: a `Source`. For one thread at a time to `add`
    and `close`; what `find` returns is for any, before `close`."""

    path = SHARED_MEMORY

    def __init__(self) -> None:
        self._mappings: dict[int, _Mapping] = {}

    def add(self, region: Region) -> None:
        """Maps a region. Raises `MappingError`."""
        if region.number in self._mappings:
            return
        descriptor = _open(region)
        try:
            self._mappings[region.number] = _Mapping(_map(descriptor, region.size), region.size)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Gives the memory back; nothing may be copying."""
        for mapping in self._mappings.values():
            _libc.munmap(mapping.address, mapping.size)
        self._mappings.clear()

    def find(self, extents: Sequence[Fields]) -> Fill:
        """See `Source`."""
        found = []
        for number, length, offset in extents:
            begin, size = self._mappings.get(number, _NOTHING)
            if offset + length > size:
                raise FrameError(f"its pages lie outside of the shared region {number}")
            found.append((begin + offset, length))
        return lambda views, staging: staging.copy(found, views)


def _open(region: Region) -> int:
    """The descriptor of a region's memory, checked to be what its owner says."""
    path = f"/proc/{region.process}/fd/{region.descriptor}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise MappingError(
            f"process {region.process} does not let this one read its memory ({error.strerror}); "
            "run all workers of a host as one user and in one namespace of processes"
        ) from error
    try:
        status = os.fstat(descriptor)
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        right = stat.S_ISREG(status.st_mode) and seals & fcntl.F_SEAL_SHRINK
        if not right or (status.st_size, status.st_ino) != (region.size, region.inode):
            raise MappingError(
                f"process {region.process} has other memory than it says; run all workers of a "
                "host in one namespace of processes"
            )
    except OSError:
        os.close(descriptor)
        raise MappingError(f"process {region.process} shares something that is no memory") from None
    except MappingError:
        os.close(descriptor)
        raise
    return descriptor


def _map(descriptor: int, size: int) -> int:
    # Not Python's mmap, which tells no address of memory that is only read.
    address = _libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
    if address in (None, _FAILED):
        reason = os.strerror(ctypes.get_errno())
        raise MappingError(f"{size} bytes of another process cannot be mapped: {reason}")
    return int(address)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
