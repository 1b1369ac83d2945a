"""What runs do that no law does is said, and forms that do not describe them say nothing."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec import UNSET

from fourfold.cli.main import run
from fourfold.train.law.checks import (
    by_tokens,
    check,
    dense_twins,
    misfit,
    size_power,
    tells_size,
)
from fourfold.train.law.fitting import fit
from fourfold.train.law.records import RunRecord, read_records, write_record
from fourfold.train.law.report import lines_of, make_report, write_report
from tests.cpu.train.law.known import SPARSE, TOKENS, Known, grid

LAW = Known()
PUBLISHED = Path(__file__).parents[4] / "benchmarks/law/records"


def changed(begins: str, factor: float) -> list[RunRecord]:
    """Losses of the runs whose name begins so, times a factor."""
    return [
        msgspec.structs.replace(record, loss=record.loss * factor)
        if record.name.startswith(begins)
        else record
        for record in grid(LAW)
    ]


def cut_short(records: list[RunRecord]) -> list[RunRecord]:
    """Runs that learn most at their ends, as those of too few steps do."""
    middle = TOKENS[1]
    return [
        msgspec.structs.replace(r, loss=r.loss * (1.25 if r.tokens <= middle else 1.0))
        for r in records
    ]


def test_a_law_gives_no_doubt() -> None:
    records = grid(LAW, noise=5e-4)
    found = check(records)
    assert found.doubts == ()
    assert (found.runs, found.chains, found.seeds) == (57, 19, 1)
    assert (found.active, found.tokens) == ((1_000_000, 64_000_000), (TOKENS[0], TOKENS[-1]))
    assert found.steps is UNSET
    assert found.seed_noise is UNSET
    [dense] = [r for r in records if r.name == "4M-x1-200M-s0"]
    gains = [1 - r.loss / dense.loss for r in records if r.model == "4M" and r.tokens == TOKENS[-1]]
    assert min(gains) < found.sparse_gain < max(gains)


@pytest.mark.parametrize("power", [0.1, 0.4])
def test_the_power_of_size_is_found(power: float) -> None:
    records = [
        msgspec.structs.replace(r, loss=r.active**-power * (900 + 1e9 / r.tokens))
        for r in grid(LAW)
    ]
    assert size_power(records) == pytest.approx(power)
    assert size_power([r for r in records if r.model == "1M"]) == 0.0


def test_runs_on_about_as_many_tokens_belong_together() -> None:
    records = [
        msgspec.structs.replace(r, tokens=r.tokens + 1000 * i) for i, r in enumerate(grid(LAW))
    ]
    groups = by_tokens(records)
    assert [len(group) for group in groups] == [19, 19, 19]
    assert [group[0].tokens // 10**7 for group in groups] == [5, 10, 20]


@pytest.mark.parametrize(
    ("records", "doubt"),
    [
        (cut_short(grid(LAW)), "19 (1M-x1-s0, 2M-x1-s0, 4M-x1-s0, ..) of 19 models gain more"),
        (changed("8M-x1-200M", 1.3), "1 (8M-x1-s0) of 19 models lose more on more tokens"),
        (
            changed("16M-x1", 1.1),
            "larger dense models lose more: 16M than 8M on 50M tokens; 16M than 8M on 100M tokens; "
            "16M than 8M on 200M tokens",
        ),
        (
            changed("4M-x8-50M", 1.2),
            "1 (4M-x8-50M-s0) of 36 sparse runs lose no less than their dense twin",
        ),
    ],
)
def test_what_no_law_does_is_doubted(records: list[RunRecord], doubt: str) -> None:
    assert any(doubt in said for said in check(records).doubts)


def test_a_twin_is_told_by_its_shape() -> None:
    """Sparse runs have a rate of their own, and so a name."""
    named = [
        msgspec.structs.replace(r, model=f"{r.model}-sparse") if r.ratio > 1 else r
        for r in grid(LAW, noise=5e-4)
    ]
    assert check(named).sparse_gain == check(grid(LAW, noise=5e-4)).sparse_gain > 0
    [sparse] = [r for r in named if r.name == "8M-x16-100M-s0"]
    assert [r.name for r in dense_twins(sparse, named)] == [
        f"8M-x1-{tokens // 10**6}M-s0" for tokens in TOKENS
    ]
    longer = msgspec.structs.replace(sparse, layers=9)
    larger = msgspec.structs.replace(sparse, active=2 * sparse.active)
    assert dense_twins(longer, named) == dense_twins(larger, named) == []


def test_published_runs_all_have_their_twin() -> None:
    """The router is all that they have more."""
    records = read_records(PUBLISHED)
    sparse = [record for record in records if record.ratio > 1]
    assert len(sparse) == 36
    for record in sparse:
        router = record.layers * record.width * record.ratio * record.chosen
        twins = dense_twins(record, records)
        assert {twin.active for twin in twins} == {record.active - router}
        assert {twin.model for twin in twins} == {record.model.removesuffix("-sparse")}


def test_seeds_tell_how_much_is_luck() -> None:
    noise = 2e-3
    twice = [
        msgspec.structs.replace(r, name=f"{r.name}{seed}", chain=f"{r.chain}{seed}", seed=seed)
        for seed in (0, 1)
        for r in grid(LAW, noise=noise, seed=seed)
    ]
    found = check(twice)
    assert found.seeds == 2
    assert found.seed_noise == pytest.approx(noise, rel=0.3)


def test_steps_are_those_of_the_arguments() -> None:
    records = [
        msgspec.structs.replace(r, arguments=("base.toml", "--set", f"schedule.steps={steps}"))
        for steps, r in zip((244, 488, 977), grid(LAW)[:3], strict=True)
    ]
    assert [record.steps for record in records] == [244, 488, 977]
    assert check([*records, *grid(LAW)[3:]]).steps == (244, 977)


def test_a_misfit_is_a_factor_in_size() -> None:
    """Losses off by as much as a size half as large would be stand for a factor of two."""
    fitted = fit(grid(LAW), "joint", starts=8, resamplings=0, seed=0)
    power = size_power(grid(LAW))
    assert misfit(fitted, power) == pytest.approx(1.0, abs=1e-4)
    off_N = np.where(np.arange(57) % 2, 1, -1) * power * np.log(2)
    wrong = type(fitted)(fitted.form, fitted.theta_P, fitted.sampled_QP, off_N)
    assert misfit(wrong, power) == pytest.approx(2.0)
    assert misfit(wrong, 0.0) == float("inf")
    assert tells_size(fitted, grid(LAW))
    assert not tells_size(wrong, grid(LAW))


def test_forms_that_do_not_describe_the_runs_say_nothing_of_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = cut_short(grid(LAW))
    report = make_report(records, starts=16, resamplings=20, seed=0)
    assert not any(form.tells_size for form in report.forms.values())
    assert all(not row.forms for row in report.leverages)
    assert {claim.verdict for claim in report.claims} == {"not told"}
    # The runs themselves still say it.
    assert all(row.direct is not UNSET for row in report.leverages if row.ratio == 4)
    said = "\n".join(lines_of(report))
    assert said.count("**It does not describe these runs, and no leverage is read from it**") == 2
    assert "- **Doubt**: 19 (" in said
    assert all(f"| {size}M | not reached at ratio 32: " in said for size in SPARSE)
    for record in records:
        write_record(record, tmp_path / "records" / f"{record.name}.json")
    write_report(report, tmp_path / "fit.json")
    path = str(tmp_path / "fit.json")
    assert run(["law", "advise", path, "--flops", "3e16"]) == 2
    assert "joint form does not describe the runs" in capsys.readouterr().err
    assert run(["law", "plot", path, "--form", "png"]) == 0
