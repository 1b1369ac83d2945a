"""Advice keeps to its budgets, and nothing within them is better."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from matplotlib.figure import Figure
from msgspec import UNSET

from fourfold.cli.main import run
from fourfold.errors import ConfigError
from fourfold.train.law.advise import SEARCH, Advice, advise, costs_for, ratios_for, shapes_of
from fourfold.train.law.config import AdviseConfig
from fourfold.train.law.fitting import Fit, fit
from fourfold.train.law.forms import Points
from fourfold.train.law.leverage import Estimate
from fourfold.train.law.plots import draw
from fourfold.train.law.records import RunRecord, write_record
from fourfold.train.law.report import fit_of, make_report, write_report
from tests.cpu.train.law.known import RATIOS, TOKENS, Known, grid

GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    return grid(Known())


@pytest.fixture(scope="module")
def joint(records: list[RunRecord]) -> Fit:
    return fit(records, "joint", starts=16, resamplings=20, seed=0)


def options(**fields: Any) -> AdviseConfig:
    return AdviseConfig(fit=Path("fit.json"), hardware=GPU, **{"flops": 3e16} | fields)


def advised(joint: Fit, records: list[RunRecord], **fields: Any) -> dict[int, Advice]:
    found = advise(options(**fields), joint, records, ratios_for(records))
    losses = [advice.loss for advice in found]
    assert losses == sorted(losses)
    return {int(advice.ratio): advice for advice in found}


def test_shapes_are_those_of_the_runs(records: list[RunRecord]) -> None:
    shapes = shapes_of(records)
    assert shapes.expert_share == pytest.approx(0.5)
    assert shapes.chosen == 4
    for record in records:
        assert shapes.total(record.active, record.ratio) == pytest.approx(record.total, rel=1e-2)
        flops = shapes.flops_per_token(record.active)
        assert flops == pytest.approx(record.flops_per_token)
    layers, width, hidden = shapes.layer(4e6)
    assert layers * 3 * width * hidden == pytest.approx(0.5 * 4e6)
    with pytest.raises(ConfigError, match="no record is of a sparse model"):
        shapes_of([record for record in records if record.ratio == 1])


def test_no_other_size_is_better(joint: Fit, records: list[RunRecord]) -> None:
    shapes = shapes_of(records)
    found = advised(joint, records)
    assert list(found) == [64, 32, 16, 8, 4, 2, 1]
    for ratio, advice in found.items():
        assert advice.bound == "training"
        spent = advice.tokens * shapes.flops_per_token(advice.active)
        assert spent == pytest.approx(3e16)
        for factor in (0.8, 1.25):
            size = np.array([factor * advice.active])
            tokens = np.array([3e16 / shapes.flops_per_token(float(size[0]))])
            [other] = joint.loss(Points(size, np.array([float(ratio)]), tokens))
            assert other > advice.loss
        assert ("ratio" in advice.beyond) == (ratio > max(RATIOS))
        low, high = advice.sizes
        assert 0 < low <= 1.04 * advice.active <= 1.09 * high < 1.5 * low
    assert found[32].dense / found[32].active > found[4].dense / found[4].active > 1


@pytest.mark.parametrize(
    ("budget", "spent"), [({"memory_gib": 0.05}, "memory"), ({"step_ms": 0.35}, "step")]
)
def test_budgets_are_kept(
    joint: Fit, records: list[RunRecord], budget: dict[str, float], spent: str
) -> None:
    free, bound = advised(joint, records), advised(joint, records, **budget)
    limit = 0.05 * 2**30 if spent == "memory" else 0.35e-3
    kinds = set()
    for ratio, advice in bound.items():
        assert getattr(advice, spent) <= limit
        assert advice.loss >= free[ratio].loss
        kinds.add(advice.bound)
        if advice.bound == spent:
            assert getattr(advice, spent) > 0.8 * limit
            assert advice.loss > free[ratio].loss
    assert spent in kinds


def test_little_memory_wants_less_sparsity(joint: Fit, records: list[RunRecord]) -> None:
    """Of many training FLOPs and little memory a dense model makes the most."""
    little = advised(joint, records, flops=1e20, memory_gib=0.02)
    much = advised(joint, records, flops=1e16, memory_gib=1.0)
    assert next(iter(little)) < next(iter(much))


def test_a_law_that_tells_nothing_of_size_advises_nothing(records: list[RunRecord]) -> None:
    flat = [msgspec.structs.replace(r, loss=3.0 + 5e6 / r.tokens) for r in records]
    with pytest.raises(ConfigError, match="do not tell the exponent of size"):
        advised(fit(flat, "joint", starts=8, resamplings=5, seed=0), flat)


def test_sizes_that_resampled_laws_find_best_are_told(records: list[RunRecord]) -> None:
    """The more luck there is in the runs, the farther they lie apart."""
    spreads = []
    for noise in (1e-4, 2e-3):
        noisy = grid(Known(), noise=noise)
        fitted = fit(noisy, "joint", starts=16, resamplings=50, seed=0)
        low, high = advised(fitted, noisy)[16].sizes
        exact = advised(fit(records, "joint", starts=16, resamplings=5, seed=0), records)[16]
        assert low < 1.1 * exact.active
        assert high > exact.active / 1.1
        spreads.append(high / low)
    assert spreads[0] < spreads[1]


def test_sizes_are_compared_to_those_of_their_kind(joint: Fit, records: list[RunRecord]) -> None:
    """Dense models were run up to 64 million, sparse ones up to 8."""
    found = advised(joint, records, flops=8e16)
    assert 9e6 < found[1].active < 64e6
    assert 9e6 < found[16].active < 64e6
    assert "active" not in found[1].beyond
    largest = max(record.active for record in records if record.ratio > 1)
    assert found[16].beyond["active"] == pytest.approx(found[16].active / largest)


def test_an_end_of_the_search_is_no_optimum(joint: Fit, records: list[RunRecord]) -> None:
    for flops, ends in ((1e25, np.inf), (1.0, 0.0)):
        for advice in advise(options(flops=flops), joint, records, [4, 32]):
            assert (advice.bound, advice.sizes) == (SEARCH, (ends, ends))


def test_a_law_that_tells_nothing_of_tokens_advises_nothing(records: list[RunRecord]) -> None:
    longest = [record for record in records if record.tokens == max(TOKENS)]
    with pytest.raises(ConfigError, match=r"does not say what tokens are worth.*--least-tokens"):
        advised(fit(longest, "joint", starts=8, resamplings=5, seed=0), longest)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["flops", "memory_gib", "weight_bits", "step_ms", "bandwidth"])
def test_budgets_are_numbers(name: str, wrong: float) -> None:
    with pytest.raises(
        ConfigError, match=f"--{name.replace('_', '-')} .* must be above 0, and fin"
    ):
        options(**{name: wrong})


def test_another_device_is_priced_by_its_bandwidth(
    joint: Fit, records: list[RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = dataclasses.replace(options(), hardware="Some GPU")
    with pytest.raises(ConfigError, match="give its --bandwidth"):
        costs_for(other)
    slow = costs_for(dataclasses.replace(other, bandwidth=5e11))
    assert "scaled from" in slow.origin
    assert slow.decode_ffn.per_byte > 2 * costs_for(options()).decode_ffn.per_byte


def test_the_commands_advise_and_draw(
    records: list[RunRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for record in records:
        write_record(record, tmp_path / "records" / f"{record.name}.json")
    report = make_report(records, starts=8, resamplings=10, seed=0)
    assert report.best == "joint"
    write_report(report, tmp_path / "fit.json")
    path = str(tmp_path / "fit.json")
    assert run(["law", "advise", path, "--flops", "3e16", "--memory-gib", "0.05"]) == 0
    said = capsys.readouterr()
    given = options(flops=3e16, memory_gib=0.05)
    best = advise(given, fit_of(report, "joint"), records, ratios_for(records))[0]
    assert f"take ratio {best.ratio:g}: {best.active / 1e6:.3g}M active" in said.out
    low, high = best.sizes
    assert f"active (95 %: {low / 1e6:.3g}M to {high / 1e6:.3g}M) of" in said.out
    assert f"priced by {GPU}" in said.err
    assert "it is a guess" not in said.err
    assert run(["law", "advise", path, "--flops", "3e19"]) == 0
    assert "more than 3 times beyond what was run, it is a guess" in capsys.readouterr().err
    assert run(["law", "advise", path, "--flops", "1e25"]) == 2
    said = capsys.readouterr()
    assert "take" not in said.out
    assert "lies at the end of the search" in said.err
    assert run(["law", "advise", path, "--flops", "3e16", "--step-ms", "1e-6"]) == 2
    assert "no model is within these budgets" in capsys.readouterr().err
    assert run(["law", "plot", path]) == 0
    figures = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [figure.name for figure in figures] == [
        f"{name}.svg" for name in ("losses", "leverage", "surface", "residuals")
    ]
    drawn = [figure.read_bytes() for figure in figures]
    assert run(["law", "plot", path]) == 0
    assert [figure.read_bytes() for figure in figures] == drawn
    (tmp_path / "records" / f"{records[0].name}.json").unlink()
    capsys.readouterr()
    assert run(["law", "plot", path]) == 2
    assert "the fit is of other records" in capsys.readouterr().err


def test_what_the_runs_do_not_tell_is_said(
    records: list[RunRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = make_report(records, starts=8, resamplings=10, seed=0)
    joint = report.forms["joint"]
    theta = (-12.0, *joint.theta[1:])
    forms = report.forms | {"joint": msgspec.structs.replace(joint, theta=theta)}
    write_report(msgspec.structs.replace(report, forms=forms), tmp_path / "fit.json")
    for record in records:
        write_record(record, tmp_path / "records" / f"{record.name}.json")
    assert run(["law", "advise", str(tmp_path / "fit.json"), "--flops", "3e16"]) == 0
    assert (
        "the runs do not tell E: losses and sizes beyond them are guesses"
        in capsys.readouterr().err
    )


def test_a_dense_twin_is_drawn_whatever_it_is_called(
    records: list[RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the largest sparse models, by tokens."""
    named = [
        msgspec.structs.replace(r, model=f"{r.model}-sparse") if r.ratio > 1 else r for r in records
    ]
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: figures.setdefault(Path(path).stem, figure)
    )
    draw(make_report(named, starts=8, resamplings=10, seed=0), named, tmp_path, "svg")
    _, by_tokens = figures["losses"].axes
    losses = {float(y) for dots in by_tokens.collections for _, y in np.asarray(dots.get_offsets())}
    largest = [r for r in records if r.model == "8M"]
    assert len(largest) == len(TOKENS) * (1 + len(RATIOS))
    assert losses == {record.loss for record in largest}


def test_what_is_beyond_a_figure_is_an_arrow(
    records: list[RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interval without bound goes to the figure's edge, and is not left out."""
    report = make_report(records, starts=8, resamplings=10, seed=0)
    [row] = [
        row
        for row in report.leverages
        if (row.model, row.ratio, row.tokens) == ("4M", 16, 200_000_000)
    ]
    unbounded = {"joint": Estimate(value=4.0, low=1.5)}
    row = msgspec.structs.replace(row, forms=unbounded, direct=UNSET, above=6.0)
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: figures.setdefault(Path(path).stem, figure)
    )
    draw(msgspec.structs.replace(report, leverages=(row,)), records, tmp_path, "svg")
    [axes] = figures["leverage"].axes
    drawn = {(str(line.get_marker()), *map(float, line.get_ydata())) for line in axes.lines}
    assert {("None", 1.5, 50.0), ("^", 50.0), ("o", 4.0), ("^", 6.0)} <= drawn
    assert axes.get_ylim() == (0.5, 50.0)
