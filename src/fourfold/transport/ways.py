"""Which way pages go to a peer: what was asked for, what both sides have, and what was refused."""

from __future__ import annotations

import logging

from fourfold.transport import nixl
from fourfold.transport.config import TransportConfig, TransportPath
from fourfold.transport.control import Exposed, Offer
from fourfold.transport.identity import host_id
from fourfold.transport.peer import Peer
from fourfold.transport.rdma import Exposure
from fourfold.transport.shared import Regions
from fourfold.transport.stats import SHARED_MEMORY, tcp

logger = logging.getLogger(__name__)

_READ = (TransportPath.SHARED_MEMORY, TransportPath.RDMA)
"""Ways by which the peer reads this node's memory, the better one first."""
_NAMES = {TransportPath.SHARED_MEMORY: "shared memory", TransportPath.RDMA: "RDMA"}
_NO_MEMORY = {
    TransportPath.SHARED_MEMORY: "no memory of this worker can be shared",
    TransportPath.RDMA: "no memory of this worker is registered for it; a GPU's pages are not",
}


class Ways:
    """The ways to one peer. `offer` is for any thread, the rest for one at a time."""

    def __init__(
        self,
        config: TransportConfig,
        peer: Peer,
        regions: Regions,
        exposure: Exposure | None,
    ) -> None:
        """`config`, `regions` and `exposure` are this node's own."""
        self._asked, self._host, self._peer = config.path, config.host, peer
        self._regions, self._exposure = regions, exposure
        self._refusals: dict[TransportPath, str] = {}
        self._read: TransportPath | None = None
        self.readable: frozenset[int] = frozenset()
        """Regions that the peer reads; empty where pages are sent."""

    def describe(self, streams: int, *, sent: bool = False) -> str:
        """What the path is called; `streams` connections carry what is `sent`: what does not lie
        in memory that the peer reads."""
        if sent or self._read is None:
            return tcp(streams)
        return nixl.describe() if self._read is TransportPath.RDMA else SHARED_MEMORY

    def offer(self) -> Offer | Exposed | None:
        """What the peer needs to read this node's regions as they are now, by the best way that
        may be tried; None where none may."""
        for way in _READ:
            if self._why_not(way) is None:
                if way is TransportPath.SHARED_MEMORY:
                    return Offer(self._regions.offers())
                assert self._exposure is not None
                return self._exposure.offer()
        return None

    def answered(self, way: TransportPath, regions: list[int], refusal: str) -> None:
        """The peer can read these regions; why it cannot read others."""
        if way is TransportPath.SHARED_MEMORY:
            offered = frozenset(each.number for each in self._regions.offers())
        else:
            offered = self._exposure.numbers if self._exposure is not None else frozenset()
        if readable := offered & frozenset(regions):
            self._read, self.readable = way, readable
        elif self._read is None:
            self._refusals[way] = refusal
        if refusal:
            near = " though it is on this host" if way is TransportPath.SHARED_MEMORY else ""
            logger.warning(
                "pages to %s do not go over %s%s: %s", self._peer.name, _NAMES[way], near, refusal
            )

    def settle(self) -> str | None:
        """No way is left but to send pages: why that may not be, or None, with a warning of what
        would be faster."""
        if self._asked in _READ:
            return self._settle_without(self._asked)
        if self._asked is TransportPath.TCP:
            return None
        mine, theirs = host_id(), self._peer.host_id
        if mine != theirs and mine.partition("/")[0] == theirs.partition("/")[0] != "":
            logger.warning(
                "pages to %s go over TCP though it is on this host; start the containers of both "
                "in one namespace of processes for shared memory",
                self._peer.name,
            )
        elif mine != theirs and (devices := nixl.devices()):
            logger.warning(
                "pages to %s go over TCP though this machine has RDMA (%s): %s",
                self._peer.name,
                ", ".join(devices),
                self._why_not(TransportPath.RDMA),
            )
        return None

    def _settle_without(self, way: TransportPath) -> str | None:
        """As `settle`, where this way was asked for. Without any memory to read there are still
        pages that the peer copies out of a GPU, and copies of others."""
        why_not = self._why_not(way)
        if why_not != _NO_MEMORY[way]:
            return f"{_NAMES[way]} was asked for, but {why_not}"
        pulls = way is TransportPath.SHARED_MEMORY and self._peer.device is not None
        logger.log(
            logging.INFO if pulls else logging.WARNING,
            "%s was asked for, but %s; what is sent to %s goes over TCP",
            _NAMES[way],
            why_not,
            self._peer.name,
        )
        return None

    def _why_not(self, way: TransportPath) -> str | None:
        """Why a way cannot be taken; None where it is to be tried."""
        if self._asked not in (way, TransportPath.AUTO):
            return f"{self._asked} was asked for"
        if way in self._refusals:
            return self._refusals[way]
        return self._why_not_shared() if way is _READ[0] else self._why_not_rdma()

    def _why_not_shared(self) -> str | None:
        mine, theirs = host_id(), self._peer.host_id
        if not mine or mine != theirs:
            return (
                "shared memory needs one host and one namespace of processes "
                f"(here {mine or 'unknown'}, there {theirs or 'unknown'})"
            )
        return None if self._regions.offers() else _NO_MEMORY[TransportPath.SHARED_MEMORY]

    def _why_not_rdma(self) -> str | None:
        if self._exposure is None:
            why_not = nixl.why_not(self._host)
            return why_not or "this worker does not use it; start it with --transport rdma"
        if not self._peer.rdma:
            return (
                f"{self._peer.name} reads nothing by it; give it an RDMA device and NIXL "
                f"({nixl.INSTALL}), and start it with --transport rdma"
            )
        if not self._exposure.numbers:
            return _NO_MEMORY[TransportPath.RDMA]
        return None
