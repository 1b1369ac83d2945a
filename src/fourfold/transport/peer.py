"""How a worker's memory is reached by others."""

from __future__ import annotations

import msgspec

from fourfold.transport.format import PageFormat


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the transport, as others are told of it."""

    name: str
    epoch: int
    """Drawn when the process began: what was meant for an earlier one is never taken for this."""
    host: str
    port: int
    host_id: str = ""
    """Equal for nodes that can read each other's shared memory."""
    pages: PageFormat | None = None
    """What its pages are; None for a node without any."""
