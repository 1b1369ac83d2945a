"""What an operator may choose about the HTTP edge.

Apart from the modules that use it, so that a command line can be built from it without importing
a web framework. What a *request* may ask for is not here: those budgets belong to the gateway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from fourfold.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """Options of the HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 or :: opens the server to other machines."""

    port: int = 8000
    """TCP port to listen on; 0 takes any free one."""

    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=(), repr=False)
    """Keys of which clients must send one as `Authorization: Bearer KEY`; none means no check."""

    drain_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM or Ctrl-C."""

    max_connections: int = 1024
    """Connections held at once; more are answered 503 and closed."""

    max_head_bytes: int = 65_536
    """Largest request line with headers, in bytes (431 beyond); trailers are cut off beyond it."""

    max_body_bytes: int = 4 * 1024 * 1024
    """Largest request body, in bytes (413 beyond)."""

    max_prompts: int = 64
    """Most prompts in one request to /v1/completions; at most --max-concurrent ever are."""

    header_timeout: float = 10.0
    """Seconds for a request's headers to arrive (408 beyond)."""

    body_timeout: float = 30.0
    """Seconds for a request's whole body to arrive (408 beyond)."""

    write_timeout: float = 60.0
    """Seconds for which a client may take nothing of an answer before it is cut off."""

    keep_alive_timeout: int = 15
    """Seconds that an idle connection stays open for the next request."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port {self.port} must be between 0 and 65535")
        for name in ("max_connections", "max_head_bytes", "max_body_bytes", "max_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self._option(name)} must be at least 1")
        for name in ("header_timeout", "body_timeout", "write_timeout", "keep_alive_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{self._option(name)} must be finite and above 0")
        if not 0 <= self.drain_timeout < math.inf:
            raise ConfigError(f"{self._option('drain_timeout')} must be finite, 0 or more")
        for key in self.api_key:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an --api-key must be printable ASCII without spaces, not empty")

    def _option(self, name: str) -> str:
        return f"--{name.replace('_', '-')} {getattr(self, name)}"
