"""What processes take of their machine."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Size:
    """What a process takes of its machine."""

    resident_mib: float
    descriptors: int
    threads: int


def size_of(pid: int) -> Size | None:
    """None where there is no such process."""
    try:
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if ":" in line
        )
        return Size(
            resident_mib=int(status["VmRSS"].split()[0]) / 1024,
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=int(status["Threads"]),
        )
    except (OSError, KeyError):
        return None
