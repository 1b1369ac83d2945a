"""Which workers a server has, and what secures the way to them. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fourfold.engine.messages import Role
from fourfold.errors import ConfigError
from fourfold.gateway.fleet.config import FleetConfig
from fourfold.transport import nixl
from fourfold.transport.config import TlsFiles, TransportConfig, TransportPath, is_loopback

_MIN_KEY_BYTES = 16
_LOOPBACK = "127.0.0.1"
EVERY_ADDRESS = frozenset(("", "0.0.0.0", "::"))
"""Hosts that stand for all addresses of a machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """How workers and gateways reach each other, and trust each other."""

    key_file: Path | None = None
    """File with the key that all workers and gateways of a service share, 16 bytes or more."""
    tls_cert: Path | None = None
    """PEM file with this side's certificate; with --tls-key and --tls-ca, everything between
    workers, and between them and gateways, is encrypted."""
    tls_key: Path | None = None
    """PEM file with its key."""
    tls_ca: Path | None = None
    """PEM file with the authority that signed the certificates of all workers and gateways."""
    advertise: str | None = None
    """Address by which other machines reach the workers here. Default: the one they listen on."""
    transport: Annotated[TransportPath, tyro.conf.EnumChoicesFromValues] = TransportPath.AUTO
    """How pages go between workers. auto: over shared memory where they share a machine, else RDMA
    where both have a device for it and NIXL (pip install 'fourfold[rdma]'), else TCP. Whatever was
    asked for, copies that lie in no memory which others read, such as converted pages, go over
    TCP."""

    def __post_init__(self) -> None:
        given = [file is not None for file in (self.tls_cert, self.tls_key, self.tls_ca)]
        if any(given) and not all(given):
            raise ConfigError("TLS needs all of --tls-cert, --tls-key and --tls-ca")

    def to_transport(self, host: str, port: int = 0) -> TransportConfig:
        """That of a node that listens at an address. Raises `ConfigError` where others could not
        reach it, key and TLS files cannot be used, or RDMA was asked for and cannot be had."""
        if host in EVERY_ADDRESS and self.advertise is None:
            raise ConfigError(
                f"{host} is no address that other workers could send pages to; say with "
                "--advertise by which they reach this machine"
            )
        if self.advertise is not None and is_loopback(host) and not is_loopback(self.advertise):
            raise ConfigError(
                f"--advertise {self.advertise} sends other workers to where nothing listens, for "
                f"the pages here are at {host} alone; give an address of this machine with --host "
                "(of fourfold serve: --cluster-host)"
            )
        if self._tls is not None:
            from fourfold.transport.tls import load_tls

            load_tls(self._tls)  # nobody should load a model first
        if self.transport is TransportPath.RDMA:
            nixl.check(host)  # nor here
        return TransportConfig(
            host=host,
            port=port,
            advertise=self.advertise,
            key=None if self.key_file is None else _read_key(self.key_file),
            tls=self._tls,
            path=self.transport,
        )

    @property
    def _tls(self) -> TlsFiles | None:
        if self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            return None
        return TlsFiles(certificate=self.tls_cert, key=self.tls_key, authority=self.tls_ca)


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
    cluster_host: str = _LOOPBACK
    """Address at which workers may join; beyond loopback only with --key-file."""
    cluster_port: int | None = None
    """TCP port at which workers may join; 0 takes any free one. Default: none may."""
    links: LinkConfig = LinkConfig()
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
        if self.cluster_port is None:
            given = {"cluster-host": self.cluster_host, "advertise": self.links.advertise}
            for name, value in given.items():
                if value not in (None, _LOOPBACK):
                    raise ConfigError(
                        f"--{name} {value} is where workers join, and without a --cluster-port "
                        "none may; give one"
                    )
        if self.links.key_file is None and not is_loopback(self.cluster_host):
            raise ConfigError(
                f"--cluster-host {self.cluster_host} lets anybody join; give a --key-file"
            )

    def to_transport(self) -> TransportConfig:
        """That of local workers, which others reach at `cluster_host`. Raises as
        `LinkConfig.to_transport`."""
        return self.links.to_transport(self.cluster_host)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Those of the local workers."""
        both = self.workers
        if both is None:
            both = 0 if self.prefill or self.decode else 1
        counts = {Role.BOTH: both, Role.PREFILL: self.prefill, Role.DECODE: self.decode}
        return tuple(role for role, count in counts.items() for _ in range(count))


def _read_key(path: Path) -> bytes:
    """A shared key, without white space around it."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"--key-file {path} cannot be read: {error.strerror}") from None
    if len(key) < _MIN_KEY_BYTES:
        raise ConfigError(f"--key-file {path} must hold {_MIN_KEY_BYTES} bytes or more")
    return key
