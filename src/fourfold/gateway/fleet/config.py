"""What a fleet tolerates. Importing this needs nothing heavy."""

from __future__ import annotations

import dataclasses
import math

from fourfold.errors import ConfigError

_LONGEST_SILENCE = 86_400
"""Seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """How long workers may be silent, and how often a request is tried."""

    worker_timeout: float = 3.0
    """Seconds of silence after which a worker is taken for dead, and its requests go on elsewhere.
    """
    max_attempts: int = 5
    """Times in a row that a sample may lose its worker without one new token before it fails."""
    pages_timeout: float = 60.0
    """Seconds that a prompt's pages may take to another worker once it is computed."""

    def __post_init__(self) -> None:
        if not 0 < self.pages_timeout < math.inf:
            raise ConfigError(f"--pages-timeout {self.pages_timeout} must be positive and finite")
        if not 1 <= self.worker_timeout <= _LONGEST_SILENCE:
            raise ConfigError(
                f"--worker-timeout {self.worker_timeout} must be at least 1 and at most "
                f"{_LONGEST_SILENCE}: workers say something every half second"
            )
        if self.max_attempts < 1:
            raise ConfigError(f"--max-attempts {self.max_attempts} must be at least 1")
