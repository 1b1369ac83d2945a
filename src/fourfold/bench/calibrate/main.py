"""Times every point, fits each model to two thirds of them and reports its error on the rest."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from itertools import compress

import torch

from fourfold.bench.calibrate.compiling import compile_parts
from fourfold.bench.calibrate.config import CalibrateConfig
from fourfold.bench.calibrate.fit import error_of, fit_roofline, held_out
from fourfold.bench.calibrate.points import POINTS, RECIPE, Point, decode_attention_steps
from fourfold.bench.figures import format_figure
from fourfold.bench.kernels.ceilings import ceilings
from fourfold.bench.kernels.timing import CudaTimer, Timer
from fourfold.bench.record import check_writable, software_versions
from fourfold.errors import ConfigError
from fourfold.files import write_atomically
from fourfold.kernels.decode_attention import DecodeCost
from fourfold.kernels.decode_attention.cost import Measurement, fit
from fourfold.quadrants.costs import (
    Limits,
    ModelError,
    QuadrantCosts,
    Roofline,
    Work,
    calibration_path,
    memory_bandwidth,
    to_json,
)

_PACKAGES = ("fourfold", "torch", "triton")


@dataclasses.dataclass(frozen=True)
class Timed:
    """A point without its tensors."""

    name: str
    work: Work
    seconds: float


def main(config: CalibrateConfig) -> int:
    """Measures, fits, prints the errors and writes the file."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "a calibration times the kernels on a GPU and torch finds none; run this on a machine "
            "with an NVIDIA GPU, its driver and a CUDA build of torch"
        )
    if config.out is not None:
        check_writable(config.out)
    started = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    compile_parts()
    print(f"kernels compiled after {time.monotonic() - started:.0f} s", flush=True)
    print(_line("part", "points", "held out", "median error", "worst error", "took"))
    costs = calibrate(device, CudaTimer())
    path = config.out or calibration_path(costs.hardware)
    write_atomically(path, to_json(costs))
    print(f"{costs.hardware}: {path}, after {time.monotonic() - started:.0f} s")
    return 0


def calibrate(device: torch.device, timer: Timer) -> QuadrantCosts:
    """The models of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    limits = _limits(device, timer)
    errors: dict[str, ModelError] = {}

    def report(part: str, points: int, error: ModelError, started: float) -> None:
        errors[part] = error
        median, worst = (format_figure(100 * off, "%") for off in (error.median, error.worst))
        took = f"{time.monotonic() - started:.1f} s"
        print(_line(part, str(points), str(error.points), median, worst, took), flush=True)

    def roofline(part: str) -> Roofline:
        started = time.monotonic()
        timed = time_points(POINTS[part](device), timer)
        model, error = fit_part(timed)
        report(part, len(timed), error, started)
        return model

    models = {part: roofline(part) for part in POINTS}
    started = time.monotonic()
    measured = time_plans(device)
    decode_attention, error = fit_decode(
        measured, properties.name, properties.multi_processor_count, limits.bandwidth
    )
    report("decode_attention", len(measured), error, started)
    return QuadrantCosts(
        hardware=properties.name,
        origin="measured",
        memory_bandwidth=memory_bandwidth(device.index),
        limits=limits,
        recipe=RECIPE,
        decode_attention=decode_attention,
        errors=errors,
        versions=software_versions(_PACKAGES),
        **models,
    )


def time_points(points: Iterator[Point], timer: Timer) -> list[Timed]:
    """Times one point after the other; each is dropped before the next is built."""
    timed = []
    for point in points:
        (timing,) = timer([point.run], graph=True)
        timed.append(Timed(point.name, point.work, timing.seconds))
        del point
    torch.cuda.empty_cache()
    return timed


def fit_part(timed: Sequence[Timed]) -> tuple[Roofline, ModelError]:
    """A model fitted to two thirds of the points, and its error on the others."""
    out = held_out(len(timed))
    kept = list(compress(timed, (not held for held in out)))
    model = fit_roofline([point.work for point in kept], [point.seconds for point in kept])
    tests = list(compress(timed, out))
    predicted = [model.seconds(point.work) for point in tests]
    return model, error_of(predicted, [point.seconds for point in tests])


def fit_decode(
    measured: Sequence[Measurement], hardware: str, processors: int, bandwidth: float
) -> tuple[DecodeCost, ModelError]:
    """A model of plans of decode attention, fitted to all of them, since plans are chosen by small
    differences; and the error, on a third, of one that is fitted to the others."""
    out = held_out(len(measured))
    kept = list(compress(measured, (not held for held in out)))
    tests = list(compress(measured, out))
    without = fit(kept, hardware, processors, bandwidth)
    predicted = [float(without.seconds(m.work, m.head_width)) for m in tests]
    error = error_of(predicted, [m.seconds for m in tests])
    return fit(measured, hardware, processors, bandwidth), error


def time_plans(device: torch.device) -> list[Measurement]:
    """Times plans of decode attention."""
    measured = [
        Measurement(plan.work, plan.shape.head_width, step.seconds(plan))
        for step, plans in decode_attention_steps(device)
        for plan in plans
    ]
    torch.cuda.empty_cache()
    return measured


def _limits(device: torch.device, timer: Timer) -> Limits:
    rates: dict[str, float] = {}
    for case in ceilings(device):
        (timing,) = timer([case.run], graph=case.graph)
        rates[case.ceiling] = case.work / timing.seconds
        del case
    products = max(rates["cuBLAS INT8"], rates.get("cuBLAS FP8", 0.0))
    return Limits(bandwidth=rates["copy bandwidth"], operations=products)


def _line(part: str, points: str, held: str, median: str, worst: str, took: str) -> str:
    return f"{part:<18} {points:>6} {held:>8} {median:>12} {worst:>12} {took:>7}"
