"""Who is at the other end: what both sides of a connection tell each other once it is secure."""

from __future__ import annotations

import functools
from pathlib import Path

import msgspec

from fourfold.transport.format import PageFormat, check_agreement
from fourfold.transport.peer import DevicePages


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A process of the service. Parallelism, device and page count are each one's own business."""

    name: str
    epoch: int
    """Drawn when the process began, 64 bits: see `Peer`."""
    model: str
    """Fingerprint of the checkpoint and its precision."""
    pages: PageFormat | None = None
    """None for one without pages of its own, such as a gateway."""
    device: DevicePages | None = None
    """Where they lie, if on a GPU that shares its memory."""


def check_identities(mine: Identity, theirs: Identity) -> None:
    """Raises `ConfigError`, with both values, where the two could not work together."""
    if mine.pages is not None and theirs.pages is not None:
        check_agreement(mine.pages, theirs.pages, mine.model, theirs.model)


@functools.cache
def host_id() -> str:
    """Equal for processes that can open each other's memory: kernel and namespace of processes.

    Empty where the system offers no such thing.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
