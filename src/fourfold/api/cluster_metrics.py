"""What Prometheus sees of a fleet: its workers, the links between them, requests tried again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fourfold.gateway.fleet.status import WorkerStatus

if TYPE_CHECKING:
    from fourfold.gateway.fleet.fleet import Fleet

_WORKER_GAUGES = {
    "running": "Samples in the worker's batch.",
    "waiting": "Samples that wait for room there.",
    "moving": "Samples there that wait for their prompt's pages from another worker.",
    "shared": "Samples of which a part is there that another worker counts.",
    "pages_total": "KV pages that the worker has.",
    "pages_in_use": "KV pages held by requests there.",
    "pages_cached": "KV pages held only by the prefix cache there.",
    "step_tokens": "Tokens that a step may hold there; fewer after one did not fit into memory.",
    "steps": "Steps of the worker's engine since it began.",
}
_PATH_COUNTERS = {
    "bytes": "Bytes of pages that went from or to a peer.",
    "seconds": "Seconds in which pages were under way; where the peer copies them, at the sender "
    "only those in which it said where they lie.",
    "frames": "Frames that carried them.",
    "links": "Links that stood; more than one means that some broke.",
    "stale": "Frames for what a worker does not expect any more.",
    "corrupt": "Frames whose checksum was wrong.",
    "failed": "Transfers that failed, but for those that either side gave up.",
}


class FleetCollector(Collector):
    """Reads the fleet when scraped; nothing is counted twice."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Of the fleet, of each worker, of each path."""
        workers, counts = self._fleet.workers, self._fleet.counts
        parts = CounterMetricFamily(
            "fourfold_fleet_parts", "Parts of requests that were sent out.", labels=("cut",)
        )
        parts.add_metric(("whole",), counts.whole)
        parts.add_metric(("prefill_decode",), counts.cut)
        yield parts
        retries = CounterMetricFamily(
            "fourfold_fleet_retries", "Parts that went on elsewhere, by cause.", labels=("cause",)
        )
        retries.add_metric(("worker_lost",), counts.lost - counts.unmoved)
        retries.add_metric(("pages_not_moved",), counts.unmoved)
        yield retries
        yield GaugeMetricFamily(
            "fourfold_fleet_parked_requests",
            "Requests of which something waits for a worker to come.",
            self._fleet.parked,
        )
        yield from _of_workers(workers)
        yield from _of_paths(workers)


def _of_workers(workers: Sequence[WorkerStatus]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "fourfold_worker_state",
        "1 for the state that a worker is in.",
        labels=("worker", "role", "state"),
    )
    for worker in workers:
        state.add_metric((worker.name, worker.role, worker.state), 1)
    yield state
    for field, text in _WORKER_GAUGES.items():
        gauge = GaugeMetricFamily(f"fourfold_worker_{field}", text, labels=("worker", "role"))
        for worker in workers:
            gauge.add_metric((worker.name, worker.role), getattr(worker.stats, field))
        yield gauge


def _of_paths(workers: Sequence[WorkerStatus]) -> Iterator[Metric]:
    labels = ("worker", "peer", "direction", "path")
    rate = GaugeMetricFamily(
        "fourfold_transport_bytes_per_second",
        "Rate while pages were under way, at the side that copied them.",
        labels=labels,
    )
    tested = GaugeMetricFamily(
        "fourfold_transport_tested_bytes_per_second",
        "Rate in the test of the last link, in which no pages went.",
        labels=labels,
    )
    metrics = {
        field: CounterMetricFamily(f"fourfold_transport_{field}", text, labels=labels)
        for field, text in _PATH_COUNTERS.items()
    }
    for worker in workers:
        for path in worker.paths:
            values = (worker.name, path.peer, "sends" if path.sends else "receives", path.path)
            if path.rate:
                rate.add_metric(values, path.rate)
            if path.tested:
                tested.add_metric((*values[:-1], path.tested_path), path.tested)
            for field, metric in metrics.items():
                metric.add_metric(values, getattr(path, field))
    yield rate
    yield tested
    yield from metrics.values()
