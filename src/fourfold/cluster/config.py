"""Which workers a server has. Importing this needs nothing heavy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fourfold.engine.messages import Role
from fourfold.errors import ConfigError
from fourfold.gateway.fleet.config import FleetConfig
from fourfold.transport.config import TransportConfig, TransportPath, is_loopback

_MIN_KEY_BYTES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Workers that are started here, and whether others may join."""

    workers: int | None = None
    """Local workers that compute prompts and answers alike. Default: 1, or none beside --prefill or
    --decode."""
    prefill: int = 0
    """Local workers that compute prompts and send their pages on."""
    decode: int = 0
    """Local workers that compute answers."""
    cluster_host: str = "127.0.0.1"
    """Address at which workers may join; beyond loopback only with --key-file."""
    cluster_port: int | None = None
    """TCP port at which workers may join; 0 takes any free one. Default: none may."""
    key_file: Path | None = None
    """File with the key that all workers and gateways of a service share, 16 bytes or more."""

    transport: Annotated[TransportPath, tyro.conf.EnumChoicesFromValues] = TransportPath.AUTO
    """How pages go between workers. auto: over shared memory where they share a machine, else TCP.
    """
    fleet: FleetConfig = FleetConfig()

    def __post_init__(self) -> None:
        for name in ("workers", "prefill", "decode"):
            count = getattr(self, name)
            if count is not None and count < 0:
                raise ConfigError(f"--{name} {count} must be 0 or more")
        if self.cluster_port is not None and not 0 <= self.cluster_port <= 65_535:
            raise ConfigError(f"--cluster-port {self.cluster_port} must be between 0 and 65535")
        if not self.roles and self.cluster_port is None:
            raise ConfigError("without workers nothing is served; give a --cluster-port to join at")
        if self.key_file is None and not is_loopback(self.cluster_host):
            raise ConfigError(
                f"--cluster-host {self.cluster_host} lets anybody join; give a --key-file"
            )

    def transport_of(self, key: bytes | None) -> TransportConfig:
        """That of local workers, which others reach at `cluster_host` if they may join."""
        host = "127.0.0.1" if self.cluster_port is None else self.cluster_host
        return TransportConfig(host=host, key=key, path=self.transport)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Those of the local workers."""
        both = self.workers
        if both is None:
            both = 0 if self.prefill or self.decode else 1
        counts = {Role.BOTH: both, Role.PREFILL: self.prefill, Role.DECODE: self.decode}
        return tuple(role for role, count in counts.items() for _ in range(count))


def read_key(path: Path | None) -> bytes | None:
    """The shared key, without white space around it. Raises `ConfigError`."""
    if path is None:
        return None
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--key-file {path} cannot be read: {error.strerror}") from None
    if len(key) < _MIN_KEY_BYTES:
        raise ConfigError(f"--key-file {path} must hold {_MIN_KEY_BYTES} bytes or more")
    return key
