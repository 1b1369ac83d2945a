"""The options of `fourfold calibrate`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Times the kernels on this GPU and fits what their work costs: decode attention is cut by it,
    `law advise` and the limits of `bench offline` are priced by it.

    The result replaces what is shipped with Fourfold for this GPU.
    """

    out: Path | None = None
    """Where the JSON file goes. Default: the cache directory, where Fourfold looks for it."""
