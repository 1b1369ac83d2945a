"""The calibration: fits that find known coefficients, errors on what they were not fitted to."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fourfold.bench.calibrate import main as main_module
from fourfold.bench.calibrate.config import CalibrateConfig
from fourfold.bench.calibrate.decode_steps import calibration_points
from fourfold.bench.calibrate.fit import error_of, fit_roofline, held_out
from fourfold.bench.calibrate.main import Timed, calibrate, fit_part, main, time_points
from fourfold.bench.calibrate.points import POINTS, Point, _attention
from fourfold.bench.kernels.case import Case
from fourfold.bench.kernels.timing import Timing
from fourfold.errors import ConfigError
from fourfold.kernels.decode_attention import DecodePlan, candidate_plans
from fourfold.quadrants.costs import (
    PARTS,
    ExpertsShape,
    Limits,
    Roofline,
    Work,
    ffn_work,
    load_costs,
    prefill_attention_work,
    shipped_costs,
    to_json,
)

NOTHING = Roofline(
    fixed=0.0,
    per_byte=0.0,
    per_operation=0.0,
    per_exponential=0.0,
    per_tile=0.0,
    per_step=0.0,
    per_byte_between=0.0,
)
FFN = dataclasses.replace(
    NOTHING, fixed=2e-5, per_byte=4e-13, per_operation=1e-15, per_byte_between=5e-13
)
ATTENTION = dataclasses.replace(
    NOTHING,
    fixed=5e-6,
    per_operation=1.5e-15,
    per_exponential=3e-13,
    per_tile=5e-8,
    per_step=8e-11,
)


def ffn_works() -> list[Work]:
    shapes = [
        ExpertsShape(width=2048, hidden=768, experts=128, chosen=8, weight_bits=4.125),
        ExpertsShape(width=4096, hidden=2048, experts=16, chosen=2, weight_bits=4.125),
    ]
    return [ffn_work(2**i, shape) for shape in shapes for i in range(0, 15, 2)]


def attention_works() -> list[Work]:
    chunks = [(2**i, 0) for i in range(6, 15)] + [(64, 2**i) for i in range(10, 16)]
    return [
        prefill_attention_work([chunk] * n, heads=32, kv_heads=4, head_width=width)
        for chunk in chunks
        for n in (1, 8)
        for width in (64, 128)
    ]


@pytest.mark.parametrize(("wanted", "works"), [(FFN, ffn_works()), (ATTENTION, attention_works())])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_fit_finds_the_coefficients(wanted: Roofline, works: list[Work], noise: float) -> None:
    rng = np.random.default_rng(0)
    seconds = [wanted.seconds(work) * (1 + noise * rng.standard_normal()) for work in works]
    model = fit_roofline(works, seconds)
    error = error_of(
        [model.seconds(work) for work in works], [wanted.seconds(work) for work in works]
    )
    assert error.worst < 1e-6 + 2.5 * noise
    for name, true in dataclasses.asdict(wanted).items():
        found = getattr(model, name)
        if true:
            assert found == pytest.approx(true, rel=1e-6 + 12 * noise), name
        assert found >= 0


def test_no_coefficient_is_negative_whatever_the_times() -> None:
    works = ffn_works()
    model = fit_roofline(works, [1e-3 / (i + 1) for i in range(len(works))])
    assert min(vars(model).values()) >= 0


def test_the_error_is_that_of_points_left_out() -> None:
    assert held_out(7) == [False, True, False, False, True, False, False]
    assert held_out(5) == [False, True, False, False, False]
    works = ffn_works()

    def timed(wrong: bool) -> Any:
        out = held_out(len(works))
        return [
            Timed("", work, FFN.seconds(work) * (2.0 if wrong and held else 1.0))
            for work, held in zip(works, out, strict=True)
        ]

    model, error = fit_part(timed(wrong=False))
    assert error.worst < 1e-6
    same, error = fit_part(timed(wrong=True))
    assert same == model
    assert (error.median, error.points) == (pytest.approx(0.5), sum(held_out(len(works))))


def test_points_are_built_timed_and_dropped_in_turn() -> None:
    events: list[str] = []

    def points() -> Iterator[Point]:
        for name in "ab":
            events.append(f"build {name}")
            work = Work(bytes=1.0, operations=1.0, padded=1.0)
            yield Point(name=name, work=work, run=lambda name=name: events.append(f"run {name}"))  # type: ignore[misc]

    def timer(calls: Sequence[Callable[[], object]], *, graph: bool) -> list[Timing]:
        assert graph
        for call in calls:
            call()
        return [Timing(seconds=2.0, spread=0.0) for _ in calls]

    timed = time_points(points(), timer)
    assert events == ["build a", "run a", "build b", "run b"]
    assert [point.seconds for point in timed] == [2.0, 2.0]


def test_a_point_of_attention_runs() -> None:
    chunks = ((100, 64), (70, 0))
    point = _attention(chunks, 8, 2, 64, torch.device("cpu"))
    out = point.run()
    assert isinstance(out, torch.Tensor)
    assert out.shape == (170, 8, 64)
    assert out.isfinite().all()
    assert point.work == prefill_attention_work(chunks, heads=8, kv_heads=2, head_width=64)


def test_a_calibration_can_be_read_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, on a GPU whose times are what a model says."""
    gpu = SimpleNamespace(
        name="NVIDIA T1000",
        multi_processor_count=20,
        memory_clock_rate=1_000_000,
        memory_bus_width=512,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    wanted = {part: ATTENTION if part == "prefill_attention" else FFN for part in POINTS}

    def points_of(part: str) -> Callable[[torch.device], Iterator[Point]]:
        works = attention_works() if part == "prefill_attention" else ffn_works()
        return lambda device: (
            Point(name="", work=work, run=partial(wanted[part].seconds, work)) for work in works
        )

    def ceilings(device: torch.device) -> Iterator[Case]:
        for name, work in (("copy bandwidth", 1.5e12), ("cuBLAS INT8", 4e3), ("cuBLAS FP8", 5e3)):
            yield Case(kernel=name, case="", run=lambda: 0.5, work=work, unit="B", ceiling=name)  # type: ignore[arg-type]

    def steps(device: torch.device) -> Iterator[tuple[Any, list[DecodePlan]]]:
        cost = next(shipped_costs()).decode_attention
        for step in calibration_points():
            plans = list(candidate_plans(step.sequences(), step.shape, cost))
            yield SimpleNamespace(seconds=lambda plan: plan.seconds), plans[::3]

    monkeypatch.setattr(main_module, "ceilings", ceilings)
    monkeypatch.setattr(main_module, "decode_attention_steps", steps)
    monkeypatch.setattr(main_module, "POINTS", {part: points_of(part) for part in POINTS})

    def timer(calls: Sequence[Callable[[], Any]], *, graph: bool) -> list[Timing]:
        return [Timing(seconds=call(), spread=0.0) for call in calls]

    costs = calibrate(torch.device("cpu"), timer)
    (path := tmp_path / "costs.json").write_bytes(to_json(costs))
    assert load_costs(path) == costs
    assert (costs.hardware, costs.origin) == ("NVIDIA T1000", "measured")
    assert costs.memory_bandwidth == 128e9
    assert costs.limits == Limits(bandwidth=3e12, operations=1e4)
    for part, model in wanted.items():
        assert costs.errors[part].worst < 1e-6
        assert getattr(costs, part).fixed == pytest.approx(model.fixed)
    assert costs.errors["decode_attention"].median < 0.05
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ConfigError, match="torch finds none"):
        main(CalibrateConfig())


def test_options_load_without_torch() -> None:
    code = "import sys, fourfold.bench.calibrate.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
