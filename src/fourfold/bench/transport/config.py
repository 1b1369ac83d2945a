"""The options of `fourfold bench transport`. Imports nothing heavy: the CLI is built from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from fourfold.bench.command_line import check_distinct
from fourfold.errors import ConfigError
from fourfold.transport.config import MAX_STREAMS

PathName = Literal["tcp", "shared-memory", "rdma", "device"]
LAYERS = 32
"""Over which the pages are spread."""
DEVICE_ROW_BYTES = 256
"""Pages on a GPU are made of: the keys and values of 64 tokens, in one channel of 16 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransportBenchConfig:
    """Measures pages between two processes of this machine, in turns with plain copies of as many
    bytes: over TCP sockets without checksums, in memory, and on a GPU.

    Every figure is the median over the rounds.
    """

    size: int = 512
    """MiB in one transfer."""
    page_bytes: int = 64 << 10
    """Bytes of one page in one layer."""
    run_pages: tuple[int, ...] = (32, 1)
    """Pages that lie one after the other in memory, as a fresh pool gives them to a prompt; runs
    lie in random order on both sides. 1: every page somewhere else. Each is measured."""
    streams: int | None = None
    """TCP connections for pages. Default: as when serving."""
    paths: tuple[PathName, ...] = ("tcp", "shared-memory")
    """Which ways to measure. rdma needs NIXL, and a device or UCX_TLS; device, a GPU out of whose
    memory a second process pulls the pages into its own of the same GPU."""
    rounds: int = 7
    """Turns."""
    name: str = "transport"
    """The record's name."""
    out: Path | None = None
    """Where the JSON record goes."""

    def __post_init__(self) -> None:
        check_distinct("--paths", self.paths)
        check_distinct("--run-pages", self.run_pages)
        if self.page_bytes < 1 or self.rounds < 1 or not self.paths:
            raise ConfigError("--page-bytes, --rounds and --paths must not be zero or empty")
        if not self.run_pages or min(self.run_pages) < 1:
            raise ConfigError("--run-pages must be at least 1")
        if self.pages < 1:
            raise ConfigError(
                f"--size {self.size} MiB is not one page of {self.page_bytes} bytes in each of "
                f"{LAYERS} layers"
            )
        if "device" in self.paths and self.page_bytes % DEVICE_ROW_BYTES:
            raise ConfigError(
                f"--page-bytes {self.page_bytes} must be a multiple of {DEVICE_ROW_BYTES} for "
                "--paths device"
            )
        if self.streams is not None and not 1 <= self.streams <= MAX_STREAMS:
            raise ConfigError(f"--streams {self.streams} is not within 1 to {MAX_STREAMS}")

    @property
    def pages(self) -> int:
        """Of each layer."""
        return (self.size << 20) // (LAYERS * self.page_bytes)

    @property
    def bytes(self) -> int:
        """In one transfer."""
        return LAYERS * self.pages * self.page_bytes
