"""How a node of the transport is reached, what secures it and what it may use. Imports nothing
heavy, for command lines are built from it."""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import os
from pathlib import Path

from fourfold.errors import ConfigError

MAX_STREAMS = 16


class TransportPath(enum.StrEnum):
    """How pages reach a peer."""

    AUTO = "auto"
    TCP = "tcp"
    SHARED_MEMORY = "shared-memory"
    RDMA = "rdma"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files for mutual TLS. Whoever holds a certificate of this authority is let in."""

    certificate: Path
    key: Path
    authority: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """What a node may use. `ConfigError` for what cannot be honoured."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 0
    """0 takes a free one."""
    advertise: str | None = None
    """Address that others reach this node by; `host` by default."""
    key: bytes | None = dataclasses.field(default=None, repr=False)
    """Shared by all workers and gateways of a service; needed off loopback."""
    tls: TlsFiles | None = None
    """Encrypts everything, pages included."""
    path: TransportPath = TransportPath.AUTO
    """auto: shared memory with peers that can map it, else RDMA where both sides have a device for
    it and NIXL, else TCP."""
    streams: int | None = None
    """TCP connections for pages to each peer; as many threads copy pages in shared memory. Default:
    2 on up to 4 cores, 4 on less than 16, else 8."""
    slice_bytes: int = 2 << 20
    """Of whole pages that are sent as one frame, and twice as many by a link that was fast in its
    test; a page of up to 1 MiB is never split. Smaller ones cost more of the CPU, larger ones are
    long on their way over a slow link, which is closed where one is cancelled meanwhile."""
    max_payload: int = 8 << 20
    """A frame that claims more closes its connection."""
    window_bytes: int = 64 << 20
    """Sent to a peer at most before it has dealt with it."""
    stall_seconds: float = 3.0
    """A peer that is silent for so long is given up, and a link whose transfers do not move."""
    connect_seconds: float = 5.0
    """For a connection and its handshake."""
    stand_seconds: float = 30.0
    """For a link to come to stand: its connections, the peer's answer what memory it can read,
    which may load NIXL, and its test, which moves 32 slices."""

    def __post_init__(self) -> None:
        if self.key is None and not is_loopback(self.host):
            raise ConfigError(
                f"listening on {self.host} needs a shared key, for anybody could write pages; "
                "give all workers and gateways the same --key-file, or listen on 127.0.0.1"
            )
        if self.key is not None and len(self.key) < 16:
            raise ConfigError("the key in --key-file must have 16 bytes or more")
        if self.advertise is not None and not is_host(self.advertise):
            raise ConfigError(
                f"--advertise {self.advertise!r} is no address that others could look up; give the "
                "name or IP address by which they reach this machine"
            )
        if self.streams is not None and not 1 <= self.streams <= MAX_STREAMS:
            raise ConfigError(f"streams to a peer must be 1 to {MAX_STREAMS}, not {self.streams}")
        if not 1 <= self.slice_bytes <= self.max_payload:
            raise ConfigError(
                f"slices of {self.slice_bytes} bytes do not fit frames of {self.max_payload}"
            )
        if not 1 << 20 <= self.max_payload <= self.window_bytes // 4:
            raise ConfigError(
                f"frames of {self.max_payload} bytes must be 1 MiB at least, and a quarter of the "
                f"window of {self.window_bytes} at most"
            )
        if min(self.stall_seconds, self.connect_seconds, self.stand_seconds) <= 0:
            raise ConfigError("the transport's time limits must be positive")

    @property
    def stream_count(self) -> int:
        """`streams`, or what this machine has by default."""
        if self.streams is not None:
            return self.streams
        cores = os.cpu_count() or 1
        return 2 if cores <= 4 else 4 if cores < 16 else 8


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_host(host: str) -> bool:
    """Whether `host` can be looked up at all: a name of labels, or an address."""
    try:
        return bool(host.encode("idna"))  # as connecting will
    except UnicodeError:
        return False
