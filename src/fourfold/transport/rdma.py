"""Memory that other machines read over RDMA: its owner registers it, and readers fetch from it.

A frame only says where its payload lies, as for shared memory, and the receiver reads it. It never
reads straight into pages. A READ cannot be called back: NIXL's release of one under way returns at
once, and the bytes come later all the same. So they come into memory of the transport's own, and
the thread that has claimed the pages copies them on. Who waits no longer leaves that memory to the
READ, and it is freed after the agent that could still write to it. Each link reads through an agent
of its own, which ends with the link.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import threading
import time
from collections.abc import Callable, Sequence

import xxhash

from fourfold.transport.control import Exposed, ExposedRegion
from fourfold.transport.frames import Fields, FrameError
from fourfold.transport.memory import Staging, address_of
from fourfold.transport.nixl import NixlAgent, Piece, Request, describe
from fourfold.transport.shared import SharedRegion
from fourfold.transport.sources import Fill, ReadError

_FIRST_PAUSE, _LAST_PAUSE = 20e-6, 1e-3
"""Seconds between two looks at a READ."""
_NO_END = 1 << 64
"""Above all addresses."""
_DRAIN_SECONDS = 0.5
"""For what is under way when a link ends: an owner that lives answers within that."""


class ExposeError(Exception):
    """Memory that cannot be read over RDMA; `str(error)` says why."""


class Exposure:
    """A node's regions, registered for peers to read; for any thread.

    NIXL registers memory for reading and writing alike: that nobody writes rests on peers, who all
    hold the service's key.
    """

    def __init__(self, name: str, host: str) -> None:
        """Raises `ConfigError` where NIXL cannot be used."""
        self._lock = threading.Lock()
        self._agent = NixlAgent(name, host)
        self._regions: list[ExposedRegion] = []

    def add(self, number: int, region: SharedRegion) -> None:
        """Registers a region; the owner keeps it for as long as this lives. Raises
        `ExposeError`."""
        with self._lock:
            try:
                self._agent.register(region.address, region.size)
            except Exception as error:
                raise ExposeError(
                    f"{region.size} bytes cannot be registered with NIXL ({_why(error)}); does "
                    "`ulimit -l` allow to lock as much?"
                ) from error
            self._regions.append(
                ExposedRegion(number=number, address=region.address, size=region.size)
            )

    @property
    def numbers(self) -> frozenset[int]:
        """Of the regions so far."""
        with self._lock:
            return frozenset(region.number for region in self._regions)

    def offer(self) -> Exposed:
        """What a peer needs to read them."""
        with self._lock:
            metadata = self._agent.metadata()
            return Exposed(
                agent=metadata,
                checksum=xxhash.xxh3_64_intdigest(metadata),
                regions=list(self._regions),
            )

    def close(self) -> None:
        """Ends it; who reads meanwhile fails."""
        with self._lock:
            self._agent.close()


class _Buffer:
    """Memory that READs write to."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(mmap.mmap(-1, size))
        self.address = address_of(self.view)


class RemoteMemory:
    """A peer's regions, read through an agent for this one link. `add` is for one thread at a time,
    what `find` returns for any."""

    def __init__(
        self,
        name: str,
        host: str,
        *,
        max_payload: int,
        seconds: float,
        ended: Callable[[], bool],
    ) -> None:
        """A READ of at most `max_payload` bytes fails after `seconds`, or when the link has
        `ended`. Raises `ExposeError`."""
        self.path = describe()
        self._max_payload, self._seconds, self._ended = max_payload, seconds, ended
        self._lock = threading.Lock()
        self._regions: dict[int, ExposedRegion] = {}
        self._peer = ""
        self._buffers: list[_Buffer] = []
        """All of them, until nothing can write to any."""
        self._free: list[_Buffer] = []
        self._abandoned: list[Request] = []
        self._agent = NixlAgent(name, host)

    def add(self, exposed: Exposed) -> list[int]:
        """Learns of a peer's regions; returns their numbers. Raises `ExposeError`."""
        if xxhash.xxh3_64_intdigest(exposed.agent) != exposed.checksum:
            raise ExposeError("what was said of the memory was altered on its way")
        for region in exposed.regions:
            # NIXL's own look at the bounds takes an end beyond the last address for a small one.
            if region.address < 0 or region.size < 1 or region.address + region.size > _NO_END:
                raise ExposeError(f"region {region.number} cannot lie where it is said to lie")
        try:
            self._peer = self._agent.meet(exposed.agent)
        except Exception as error:
            raise ExposeError(
                f"NIXL cannot reach its owner ({_why(error)}); have both sides RDMA devices on one "
                "network, and the same release of NIXL?"
            ) from error
        self._regions = {region.number: region for region in exposed.regions}
        return list(self._regions)

    def find(self, extents: Sequence[Fields]) -> Fill:
        """See `Source`."""
        pieces = []
        for number, length, offset in extents:
            region = self._regions.get(number)
            if region is None or offset + length > region.size:
                raise FrameError(f"its pages lie outside of the exposed region {number}")
            pieces.append((region.address + offset, length))
        return functools.partial(self._fill, pieces)

    def close(self) -> None:
        """See `Source`. Waits a moment for what is under way, for UCX over TCP has aborted owners
        whose reader went amid a READ."""
        end = time.monotonic() + _DRAIN_SECONDS
        for request in self._abandoned:
            while not self._over(request) and time.monotonic() < end:
                time.sleep(_LAST_PAUSE)
            with contextlib.suppress(Exception):  # it may insist on one that is under way
                self._agent.release(request)
        self._agent.close()
        self._buffers.clear()
        self._free.clear()

    def _fill(self, pieces: Sequence[Piece], views: Sequence[memoryview], staging: Staging) -> int:
        buffer = self._take()
        self._fetch(pieces, buffer)
        digest = staging.copy([(buffer.address, sum(map(len, views)))], views)
        with self._lock:
            self._free.append(buffer)
        return digest

    def _take(self) -> _Buffer:
        """A buffer that nothing writes to; at most one for each stream of the link."""
        with self._lock:
            if self._free:
                return self._free.pop()
            buffer = _Buffer(self._max_payload)
            self._buffers.append(buffer)
        try:
            self._agent.register(buffer.address, self._max_payload)
        except Exception as error:
            raise ReadError(f"memory to read into cannot be registered: {_why(error)}") from error
        return buffer

    def _fetch(self, pieces: Sequence[Piece], buffer: _Buffer) -> None:
        """READs pieces to the begin of a buffer, one after the other."""
        at, mine = buffer.address, []
        for _, length in pieces:
            mine.append((at, length))
            at += length
        try:
            request = self._agent.prepare(self._peer, pieces, mine)
        except Exception as error:
            raise ReadError(f"its memory is not what it said: {_why(error)}") from error
        try:
            self._wait(request)
        except BaseException:
            # It may write to the buffer until the agent is closed.
            self._abandoned.append(request)
            raise
        self._agent.release(request)

    def _wait(self, request: Request) -> None:
        """Begins a READ, and returns when everything is there."""
        pause, end = _FIRST_PAUSE, time.monotonic() + self._seconds
        try:
            done = self._agent.begin(request)
            while not done:
                if self._ended():
                    raise ReadError("the link ended amid a READ")
                if time.monotonic() > end:
                    raise ReadError(f"a READ has not come back for {self._seconds:g} s")
                time.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE)
                done = self._agent.done(request)
        except ReadError:
            raise
        except Exception as error:
            raise ReadError(f"a READ failed: {_why(error)}") from error

    def _over(self, request: Request) -> bool:
        try:
            return self._agent.done(request)
        except Exception:
            return True  # it failed, and so writes nothing any more


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
