"""How a worker's memory is reached by others."""

from __future__ import annotations

import msgspec

from fourfold.transport.format import PageFormat


class DeviceMemory(msgspec.Struct, frozen=True):
    """Memory of a GPU that other processes of the machine can map."""

    process: int
    descriptor: int
    size: int
    """Bytes that are meant; a mapping takes whole pieces of the device's memory."""


class DevicePages(msgspec.Struct, frozen=True, kw_only=True):
    """Where a node's pages lie, if on a GPU that shares its memory."""

    gpu: str
    """Its identifier (UUID)."""
    pages: int
    records: DeviceMemory
    open: DeviceMemory | None = None
    """Pages that are not full, where they are kept apart."""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the transport, as others are told of it."""

    name: str
    epoch: int
    """Drawn when the process began: what was meant for an earlier one is never taken for this."""
    host: str
    port: int
    host_id: str = ""
    """Equal for nodes that can read each other's shared memory."""
    rdma: bool = False
    """Whether it reads other nodes' memory over RDMA."""
    pages: PageFormat | None = None
    """What its pages are; None for a node without any."""
    device: DevicePages | None = None
    """None for pages that others cannot map."""
