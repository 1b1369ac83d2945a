"""How long a call takes on the GPU: replays of CUDA graphs, several calls measured in turns.

A call is timed as the difference between two graphs: one that empties the L2 cache before every
call, one that only empties it. So a call finds its inputs in memory, as the weights of a layer are
when the layer's turn comes, and the time of launching a graph and of recording events drops out;
what a kernel costs inside a graph remains, down to about a microsecond. The cache is emptied by
reading: lines that were written would have to be written back at the measured call's expense.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]

_WARM_UPS = 3
_ROUNDS = 15
_ROUND_SECONDS = 3e-3
_MOST_REPEATS = 16
_CACHES_READ = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """The time of one call over several rounds."""

    seconds: float
    """The median."""
    spread: float
    """Half of the range that the middle half of the rounds spans, relative to the median."""


class Timer(Protocol):
    """Times calls."""

    def __call__(self, calls: Sequence[Call], *, graph: bool) -> list[Timing]:
        """The time of each call, all of them measured in turns."""
        ...


def summarise(samples: Sequence[float]) -> Timing:
    """The figures of the rounds of one call, in seconds; at least two."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(seconds=middle, spread=abs(high - low) / 2 / abs(middle) if middle else 0.0)


def repeats(seconds: float) -> int:
    """How often a call of about that time is repeated in one round."""
    return max(1, min(_MOST_REPEATS, round(_ROUND_SECONDS / max(seconds, 1e-9))))


class CudaTimer:
    """Times calls on the current CUDA device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties()
        self._elsewhere = torch.ones(
            _CACHES_READ * properties.L2_cache_size // 4, dtype=torch.float32, device="cuda"
        )
        self._sum = torch.empty((), dtype=torch.float32, device="cuda")

    def __call__(self, calls: Sequence[Call], *, graph: bool) -> list[Timing]:
        prepare = self._captured if graph else self._listed
        for call in [self._empty_cache, *calls] * _WARM_UPS:
            call()
        times = [repeats(_elapsed(call)) for call in calls]
        pairs = [
            (prepare([self._empty_cache, call] * n), prepare([self._empty_cache] * n), n)
            for call, n in zip(calls, times, strict=True)
        ]
        samples: list[list[float]] = [[] for _ in calls]
        for number in range(_ROUNDS + 1):
            for sample, (full, empty, n) in zip(samples, pairs, strict=True):
                seconds = (_elapsed(full) - _elapsed(empty)) / n
                if number > 0:  # the first replay uploads the graph
                    sample.append(seconds)
        return [summarise(sample) for sample in samples]

    def _empty_cache(self) -> None:
        torch.sum(self._elsewhere, dim=0, out=self._sum)

    @staticmethod
    def _captured(calls: Sequence[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    @staticmethod
    def _listed(calls: Sequence[Call]) -> Call:
        def run() -> None:
            for call in calls:
                call()

        return run


def _elapsed(call: Call) -> float:
    """Seconds from the start to the end of a call's work on the device."""
    start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
