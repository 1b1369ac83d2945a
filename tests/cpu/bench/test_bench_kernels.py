"""The kernels' bench: what it makes of a case's times and error, and what it refuses."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import UNSET

import fourfold.bench.kernels.cases as case_package
from fourfold.bench.calibrate.decode_steps import RandomStep, StepOf
from fourfold.bench.kernels import config as config_module
from fourfold.bench.kernels.case import Case
from fourfold.bench.kernels.cases import decode_attention
from fourfold.bench.kernels.config import KernelsBenchConfig, case_files
from fourfold.bench.kernels.main import Run, main
from fourfold.bench.kernels.report import WrongResultError, header, line, measure, results
from fourfold.bench.kernels.timing import Timing, repeats, summarise
from fourfold.errors import ConfigError
from fourfold.kernels import tolerance as tolerance_module
from fourfold.kernels.decode_attention import DecodePlan, DecodeShape
from fourfold.kernels.tolerance import TOLERANCES, tolerance
from fourfold.quadrants.costs import shipped_costs


@dataclasses.dataclass
class FakeTimer:
    """A call takes as many seconds as it returns."""

    graphs: list[bool] = dataclasses.field(default_factory=list)

    def __call__(self, calls: Sequence[Callable[[], Any]], *, graph: bool) -> list[Timing]:
        self.graphs.append(graph)
        return [Timing(seconds=call(), spread=0.01) for call in calls]


def a_case(**changes: Any) -> Case:
    fields: dict[str, Any] = {
        "kernel": "fake",
        "case": "8 rows, int8",
        "run": lambda: 1e-3,
        "work": 2e9,
        "unit": "B",
        "ceiling": "copy bandwidth",
    }
    return Case(**fields | changes)


@pytest.fixture(autouse=True)
def _fake_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOLERANCES, "fake", {"int8": 0.02, "int8-g128": 0.03, "fp8": 0.1})


def test_times_are_medians_with_half_the_middle_range_as_spread() -> None:
    timing = summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.seconds == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)


@pytest.mark.parametrize(("seconds", "times"), [(0.0, 16), (5e-6, 16), (1e-3, 3), (0.5, 1)])
def test_short_calls_are_repeated_more_often(seconds: float, times: int) -> None:
    assert repeats(seconds) == times


def test_a_chosen_plan_and_the_fastest_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all lengths are equal, so that other cases have a baseline of other work."""

    def seconds(_: RandomStep, plan: DecodePlan) -> float:
        return float(len(plan.tasks_J7))

    cost = next(shipped_costs()).decode_attention
    monkeypatch.setattr(decode_attention, "cost_of", lambda device: cost)
    monkeypatch.setattr(RandomStep, "seconds", seconds)
    step = StepOf(lengths=(130,), shape=DecodeShape(heads=4, kv_heads=1, head_width=64))
    case = decode_attention._planned("one", step, torch.device("cpu"))
    measured = measure(
        dataclasses.replace(case, run=lambda: 2e-6, baseline=lambda: 1e-6, error=None), FakeTimer()
    )
    assert measured.peer is not None
    assert measured.peer.rate == pytest.approx(2 * measured.rate)


def test_rates_come_from_the_work_and_the_time() -> None:
    measured = measure(a_case(), FakeTimer())
    assert measured.rate == pytest.approx(2.0)
    assert measured.unit == "TB/s"
    assert measured.error is None
    assert measured.peer is None


def test_a_baseline_that_does_more_work_is_compared_by_its_own_rate() -> None:
    case = a_case(
        unit="FLOP", baseline=lambda: 2e-3, baseline_name="cuBLAS", baseline_work=8e9, graph=False
    )
    timer = FakeTimer()
    measured = measure(case, timer)
    assert timer.graphs == [False]
    assert measured.peer is not None
    assert measured.peer.rate == pytest.approx(4.0)
    rate, time, spread = results(measured, {"copy bandwidth": 2.5})
    assert (rate.case, rate.metric, rate.unit) == ("fake, 8 rows, int8", "rate", "TFLOP/s")
    assert (rate.limit, rate.limit_name) == (2.5, "copy bandwidth")
    assert (rate.peer, rate.peer_value) == ("cuBLAS", pytest.approx(4.0))
    assert (time.value, time.peer_value) == (1e-3, 2e-3)
    assert (spread.value, spread.unit) == (pytest.approx(1.0), "%")
    shown = line(measured, {"copy bandwidth": 2.5})
    for part in ("fake", "1.00 ms", "2.00 TFLOP/s", "0.80 copy bandwidth", "0.50 cuBLAS"):
        assert part in shown


def test_a_ceiling_the_device_lacks_leaves_its_share_out() -> None:
    measured = measure(a_case(), FakeTimer())
    assert "copy bandwidth" not in line(measured, {})
    assert all(figure.limit is UNSET for figure in results(measured, {}))


def test_a_mark_is_a_share_of_the_baseline_or_of_the_ceiling() -> None:
    peer = {"baseline": lambda: 5e-4, "baseline_name": "cuBLAS"}
    ceilings = {"copy bandwidth": 2.5}

    def marked(ceilings: dict[str, float], **changes: Any) -> Any:
        return results(measure(a_case(**changes), FakeTimer()), ceilings)[0].mark

    assert marked(ceilings, mark=0.9, **peer) == pytest.approx(3.6)
    assert marked(ceilings, mark=0.9, mark_of_ceiling=True, **peer) == pytest.approx(2.25)
    assert marked(ceilings, mark=0.8) == pytest.approx(2.0)
    assert marked({}, mark=0.8) is UNSET
    assert marked(ceilings, **peer) is UNSET


def test_the_header_stands_over_its_columns() -> None:
    shown = line(measure(a_case(error=lambda: 0.01), FakeTimer()), {"copy bandwidth": 2.0})
    assert header().index("case") == shown.index("8 rows")
    assert header().endswith("error")
    assert shown.endswith("1.0e-02")
    assert len(shown) == len(header())


@pytest.mark.parametrize("error", [0.021, float("inf"), float("nan")])
def test_a_wrong_kernel_is_not_timed(error: float) -> None:
    timer = FakeTimer()
    with pytest.raises(WrongResultError, match=r"fake \(8 rows, int8\) is off by .* 0\.02 "):
        measure(a_case(error=lambda: error), timer)
    assert timer.graphs == []


@pytest.mark.parametrize("seconds", [0.0, -1e-7])
@pytest.mark.parametrize("of", ["run", "baseline"])
def test_a_time_lost_in_noise_makes_no_rate(seconds: float, of: str) -> None:
    calls = {of: lambda: seconds, "baseline_name": "torch"}
    with pytest.raises(WrongResultError, match=r"fake \(8 rows, int8\) .* took no time"):
        measure(a_case(**calls), FakeTimer())


def test_the_tolerance_is_that_of_the_recipe_named_most_fully() -> None:
    assert tolerance("fake", "8 rows, INT8") == 0.02
    assert tolerance("fake", "8 rows, int8-g128") == 0.03
    with pytest.raises(AssertionError, match="names none of int8, int8-g128, fp8"):
        tolerance("fake", "8 rows")
    with pytest.raises(AssertionError, match="unheard_of has no tolerance"):
        tolerance("unheard_of", "8 rows")


def test_every_kernel_of_the_cases_has_a_tolerance() -> None:
    for name in case_files():
        path = Path(case_package.__path__[0]) / f"{name}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "kernel":
                for leaf in ast.walk(node.value):
                    if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                        assert leaf.value in tolerance_module.TOLERANCES, (name, leaf.value)


def test_a_run_goes_on_after_a_wrong_case_and_after_a_broken_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken() -> Iterator[Case]:
        yield a_case(case="1 row, int8")
        raise RuntimeError("out of memory")

    run = Run(FakeTimer())
    run.ceilings(iter([a_case(kernel="copy", case="copy bandwidth", run=lambda: 5e-4)]))
    run.cases(iter([a_case(error=lambda: 1.0), a_case(case="9 rows, int8", error=lambda: 0.0)]))
    assert not run.sound
    run.cases(broken())
    run.cases(iter([a_case(case="2 rows, int8")]))
    said = capsys.readouterr()
    measured = [text.split()[0] for text in said.out.splitlines()]
    assert measured == ["copy", "fake", "fake", "fake"]
    assert "0.50 copy bandwidth" in said.out
    assert "is off by" in said.err
    assert "out of memory" in said.err
    cases = dict.fromkeys(figure.case for figure in run.figures)
    assert [*cases] == [
        "copy, copy bandwidth",
        *(f"fake, {n}, int8" for n in ("9 rows", "1 row", "2 rows")),
    ]


def test_unknown_kernels_are_refused_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "case_files", lambda: ["pages", "rows"])
    assert KernelsBenchConfig(only=("rows",)).only == ("rows",)
    with pytest.raises(ConfigError, match=r"no kernels called gemm; --only takes pages, rows"):
        KernelsBenchConfig(only=("rows", "gemm"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match="torch finds none; run this on a machine with an NVIDIA"):
        main(KernelsBenchConfig())


def test_the_options_import_nothing_heavy() -> None:
    program = (
        "import sys, fourfold.cli.bench_kernels as m; m.Options();"
        "print({'torch', 'triton', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
