"""The options of `fourfold bench kernels`. Imports nothing heavy, for the CLI is built from it."""

from __future__ import annotations

import dataclasses
import pkgutil
from pathlib import Path

from fourfold.bench.command_line import check_distinct
from fourfold.bench.kernels import cases
from fourfold.errors import ConfigError


def case_files() -> list[str]:
    """The names of the files under `cases/`, each a group of kernels that belong together."""
    return sorted(module.name for module in pkgutil.iter_modules(cases.__path__))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsBenchConfig:
    """Measures every kernel on this GPU: its error, its time, its share of what the device can do.

    The ceilings (copy bandwidth, cuBLAS) and the libraries' kernels are measured in the same run.
    """

    only: tuple[str, ...] = ()
    """Which groups of kernels, for instance pages; all by default."""
    name: str = "kernels"
    """The record's name."""
    out: Path | None = None
    """Where the JSON record goes."""

    def __post_init__(self) -> None:
        check_distinct("--only", self.only)
        known = case_files()
        if unknown := [name for name in self.only if name not in known]:
            raise ConfigError(
                f"there are no kernels called {', '.join(unknown)}; --only takes {', '.join(known)}"
            )
