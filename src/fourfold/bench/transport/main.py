"""Times every path in turns with plain copies of as many bytes, and writes the record."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from msgspec import UNSET

from fourfold.bench.command_line import command_line
from fourfold.bench.figures import result_line
from fourfold.bench.record import Result, check_out, new_record, write
from fourfold.bench.transport.config import PathName, TransportBenchConfig
from fourfold.bench.transport.near import FarProcess, Near, Sample
from fourfold.transport import TransportConfig, TransportPath, nixl

_PACKAGES = ("fourfold", "xxhash")
_STREAMS = (1, 2, 4, 8)
_CHUNKS = (256 << 10, 1 << 20, 4 << 20)
_MARKS: dict[PathName, float] = {"tcp": 0.85, "shared-memory": 0.8, "device": 0.8}
"""Of the plain copy's rate; RDMA has none, for no plain copy between machines is measured."""
_ROUND_TRIPS = 5000
_ROUND_TRIP_MARK = 100.0
"""Microseconds."""

Baseline = tuple[str, Callable[[], Sample]]


class AnyLink(Protocol):
    """A way of ours, to be timed: see `OurLink`."""

    @property
    def trusts(self) -> bool: ...

    @property
    def path(self) -> str: ...

    def transfer(self, *, verify: bool) -> Sample: ...

    def round_trips(self, count: int) -> list[float]: ...


def main(config: TransportBenchConfig) -> int:
    """Runs the benchmark, prints its figures and writes its record."""
    check_out(config.out, config.name)
    if "device" in config.paths:
        from fourfold.bench.transport.device import find_gpu

        find_gpu()  # before anything is measured for nothing
    if "rdma" in config.paths:
        nixl.check(TransportConfig.host)  # as above
    far = FarProcess()
    try:
        results = []
        for run_pages, path in itertools.product(config.run_pages, config.paths):
            with _open(config, far, run_pages, path) as (link, candidates):
                case = f"{link.path}, {_describe(config, run_pages)}"
                found = _measure(config, path, link, _fastest(candidates), case)
            for result in found:
                print(result_line(result, 34), flush=True)
            results += found
    finally:
        far.close()
    if config.out is not None:
        command = command_line("fourfold bench transport", config)
        write(new_record(config.name, command, results, packages=_PACKAGES), config.out)
    return 0


def _describe(config: TransportBenchConfig, run_pages: int) -> str:
    size, page = config.bytes >> 20, config.page_bytes >> 10
    lie = "scattered" if run_pages == 1 else f"in runs of {run_pages}"
    return f"{size} MiB in pages of {page} KiB {lie}"


@contextlib.contextmanager
def _open(
    config: TransportBenchConfig, far: FarProcess, run_pages: int, path: PathName
) -> Iterator[tuple[AnyLink, list[Baseline]]]:
    """A link of a path, and the plain copies to hold it against."""
    if path == "device":
        from fourfold.bench.transport.device import NearDevice  # PyTorch, for this path alone

        with NearDevice(config, far, run_pages).link() as device:
            yield device, [("copy_ on the device", device.copy)]
        return
    near = Near(config, far, run_pages)
    with near.link(TransportPath(path)) as link:
        yield link, _candidates(near, path)


def _candidates(near: Near, path: PathName) -> list[Baseline]:
    if path == "tcp":
        return [
            (
                f"plain sockets, {streams} streams by {chunk >> 10} KiB",
                functools.partial(near.sockets, streams, chunk),
            )
            for streams, chunk in itertools.product(_STREAMS, _CHUNKS)
        ]
    cores = os.cpu_count() or 1
    return [
        (f"memcpy, {threads} threads", functools.partial(near.memory, threads))
        for threads in _STREAMS
        if threads <= cores
    ]


def _fastest(candidates: Sequence[Baseline]) -> Baseline:
    """The fastest plain copy, as two tries of each show."""
    candidates[0][1]()  # touches the memory
    return min(candidates, key=lambda candidate: min(candidate[1]().seconds for _ in range(2)))


def _measure(
    config: TransportBenchConfig,
    path: PathName,
    link: AnyLink,
    baseline: Baseline,
    case: str,
) -> list[Result]:
    name, copy = baseline
    plain, ours, trusting = [], [], []
    for _ in range(config.rounds):
        plain.append(copy())
        ours.append(link.transfer(verify=True))
        if link.trusts:
            trusting.append(link.transfer(verify=False))
    gigabytes = config.bytes / 1e9
    best = gigabytes / _median(plain, "seconds")

    def figure(metric: str, value: float, unit: str, peer: float | None = None) -> Result:
        if peer is None:
            return Result(case=case, metric=metric, value=value, unit=unit)
        return Result(case=case, metric=metric, value=value, unit=unit, peer=name, peer_value=peer)

    rate = Result(
        case=case,
        metric="rate",
        value=gigabytes / _median(ours, "seconds"),
        unit="GB/s",
        mark=_MARKS[path] * best if path in _MARKS else UNSET,
        peer=name,
        peer_value=best,
    )
    results = [rate]
    if trusting:
        seconds = _median(trusting, "seconds")
        results.append(figure("rate_without_checksums", gigabytes / seconds, "GB/s", best))
    else:  # on a GPU
        results += [
            figure(f"rate_of_{part}", gigabytes / _median(ours, part), "GB/s", best)
            for part in ("hashing", "moving")
        ]
    for side in ("near_cpu", "far_cpu"):
        metric = "cpu_sender" if side == "near_cpu" else "cpu_receiver"
        theirs = _median(plain, side) / gigabytes
        results.append(figure(metric, _median(ours, side) / gigabytes, "s/GB", theirs or None))
        if trusting:
            value = _median(trusting, side) / gigabytes
            results.append(figure(f"{metric}_without_checksums", value, "s/GB"))
    return results + _round_trips(case, link)


def _round_trips(case: str, link: AnyLink) -> list[Result]:
    times = sorted(1e6 * seconds for seconds in link.round_trips(_ROUND_TRIPS))
    return [
        Result(
            case=case,
            metric="round_trip_p50",
            value=statistics.median(times),
            unit="us",
            mark=_ROUND_TRIP_MARK,
        ),
        Result(case=case, metric="round_trip_p99", value=times[int(0.99 * len(times))], unit="us"),
    ]


def _median(samples: Sequence[Sample], field: str) -> float:
    values: list[float] = [getattr(sample, field) for sample in samples]
    return statistics.median(values)
