"""What happened in a run, and what came of it."""

from __future__ import annotations

import collections
import time

from tests.cpu.chaos.sizes import Size

_KEPT = 400
"""Events that a violation is told with."""


class Story:
    """Events with their times, counts, and whatever broke the promise. For one thread."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.faults: collections.Counter[tuple[str, str]] = collections.Counter()
        """By kind and point."""
        self.requests: collections.Counter[str] = collections.Counter()
        """By how they ended."""
        self.parts: collections.Counter[str] = collections.Counter()
        """Of requests, as fleets count them."""
        self.violations: collections.Counter[str] = collections.Counter()
        self.causes: collections.Counter[str] = collections.Counter()
        """Of requests that ended with a typed error."""
        self.detections: list[tuple[float, str]] = []
        """Seconds from a worker's death, or its silence, until the fleet knew, and whose."""
        self.recoveries: list[tuple[float, str]] = []
        """Seconds that a request went without a new token, the longest of each."""
        self.releases: list[float] = []
        """Seconds after the last request until nothing of any was held."""
        self._events: collections.deque[str] = collections.deque(maxlen=_KEPT)
        self.sizes: list[Size] = []
        """Of processes, whenever nothing was under way."""
        self.told: list[str] = []
        """The first violations, each with what led to it."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def tell(self, event: str) -> None:
        self._events.append(f"{self.seconds:9.3f}  {event}")

    def fault(self, kind: str, point: str, whom: str) -> None:
        self.faults[kind, point] += 1
        self.tell(f"FAULT {kind} at {point}: {whom}")

    def violate(self, kind: str, what: str) -> None:
        """The promise is broken. `kind` is lost, wrong, leaked, crashed or hung."""
        self.violations[kind] += 1
        self.tell(f"VIOLATION {kind}: {what}")
        if len(self.told) < 5:
            self.told.append("\n".join([f"{kind}: {what}", *self._events]))

    def report(self, seed: int) -> str:
        """Everything in few lines."""
        kinds: collections.Counter[str] = collections.Counter()
        points: collections.Counter[str] = collections.Counter()
        for (kind, point), count in self.faults.items():
            kinds[kind] += count
            points[point] += count
        broken = [f"{kind} {self.violations[kind]}" for kind in _VIOLATIONS]
        worst, whose = max(self.recoveries, default=(0.0, ""))
        latest, of_whom = max(self.detections, default=(0.0, "nobody was struck"))
        return "\n".join(
            [
                f"seed {seed}, {self.seconds:.0f} s",
                f"requests {self.requests.total()}: {_counted(self.requests)}",
                f"parts: {_counted(self.parts)}",
                f"typed errors: {_counted(self.causes) or 'none'}",
                f"faults {self.faults.total()}: {_counted(kinds)}",
                f"at: {_counted(points)}",
                f"longest wait for a token {worst:.1f} s{whose}; "
                f"detection {latest:.1f} s at most ({of_whom}); "
                f"all free {max(self.releases, default=0.0):.1f} s after the last request at most",
                f"processes: {max((each.resident_mib for each in self.sizes), default=0):.0f} MiB, "
                f"{max((each.descriptors for each in self.sizes), default=0)} descriptors, "
                f"{max((each.threads for each in self.sizes), default=0)} threads at most",
                ", ".join(broken),
            ]
        )


_VIOLATIONS = ("lost", "wrong", "leaked", "crashed", "hung")


def _counted(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())
