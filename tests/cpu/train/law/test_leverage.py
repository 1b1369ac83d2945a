"""How many times larger a dense model must be: by fits, between runs, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from msgspec import UNSET

from fourfold.cli.main import run
from fourfold.errors import ConfigError
from fourfold.train.law.fitting import Fit, fit
from fourfold.train.law.leverage import claims, dense_equivalent, direct_leverage, leverages
from fourfold.train.law.records import RunRecord, read_records, write_record
from fourfold.train.law.report import fit_of, read_report
from tests.cpu.train.law.known import RATIOS, SPARSE, Known, grid

STRONG = Known(d=0.35)
"""Reaches 7 times between ratio 4 and 8."""


def fits(records: list[RunRecord], resamplings: int = 0) -> list[Fit]:
    forms = ("per-ratio", "joint")
    return [fit(records, form, starts=16, resamplings=resamplings, seed=0) for form in forms]


def test_an_equal_dense_model_has_the_same_loss() -> None:
    law = Known(w=0.05, d=0.2)
    joint = fits(grid(law))[1]
    place = {"active": 3e6, "ratio": 12.0, "tokens": 1.5e8}
    [times] = dense_equivalent(joint.form, joint.theta_P[None], **place)
    assert times > 2
    assert law.loss(times * 3e6, 1, 1.5e8) == pytest.approx(law.loss(3e6, 12, 1.5e8), rel=1e-4)


def test_a_loss_that_no_dense_model_reaches_is_without_bound() -> None:
    law = Known(w=-0.5, a_term=0.1)
    joint = fits(grid(law))[1]
    [times] = dense_equivalent(joint.form, joint.theta_P[None], active=8e6, ratio=32.0, tokens=5e7)
    assert times == float("inf")
    row = next(r for r in leverages(grid(law), [joint]) if (r.model, r.ratio) == ("8M", 32))
    assert row.forms["joint"].value is UNSET
    assert not row.interpolated


@pytest.mark.parametrize("size", SPARSE)
@pytest.mark.parametrize("ratio", RATIOS)
def test_runs_themselves_say_the_leverage(size: int, ratio: int) -> None:
    law = Known()
    records = grid(law)
    sparse = [r for r in records if (r.model, r.ratio) == (f"{size}M", ratio)][-1:]
    times = direct_leverage(records, sparse)
    assert times == pytest.approx(law.leverage(size * 1e6, ratio), rel=0.02)


def test_a_loss_that_no_dense_runs_enclose_has_no_direct_leverage() -> None:
    records = grid(STRONG)
    best = [r for r in records if (r.model, r.ratio) == ("8M", 32)][-1:]
    assert direct_leverage(records, best) is None


def test_interpolated_and_extrapolated_are_told_apart() -> None:
    records = grid(STRONG)
    rows = {(int(r.model[:-1]), r.ratio): r for r in leverages(records, fits(records))}
    assert set(rows) == {(size, ratio) for size in SPARSE for ratio in RATIOS}
    for (size, ratio), row in rows.items():
        times = STRONG.leverage(size * 1e6, ratio)
        assert row.interpolated == (size * times <= 64), (size, ratio)
        assert row.interpolated == (row.direct is not UNSET)
        assert row.tokens == 200_000_000
        # A token costs as many FLOPs as 6 times active parameters and a million.
        dense = times * size + 1
        assert row.compute == pytest.approx(dense / (size + 1), rel=0.25)


def test_the_claim_of_seven_times_is_judged() -> None:
    def verdicts(law: Known) -> dict[int, str]:
        records = grid(law)
        both = fits(records)
        found = claims(leverages(records, both), both[1])
        return {int(claim.model[:-1]): claim.verdict for claim in found}

    # At 8 million, the first ratio that reaches it is as good as 90 million dense ones.
    assert verdicts(STRONG) == {2: "reached", 4: "reached", 8: "extrapolated"}
    assert verdicts(Known(d=0.15, g=0.0)) == dict.fromkeys(SPARSE, "foretold")
    assert verdicts(Known(d=0.02, g=0.0)) == dict.fromkeys(SPARSE, "not reached")


def test_runs_that_tell_nothing_of_size_claim_nothing() -> None:
    """Sizes that are all as good: their exponent lies on its bound, and no leverage is given."""
    records = [
        msgspec.structs.replace(record, loss=3.0 + 5e6 / record.tokens + 1e-3 * (record.ratio > 4))
        for record in grid(Known())
    ]
    both = fits(records)
    assert all("a" in fitted.untold for fitted in both)
    rows = leverages(records, both)
    assert all(not row.forms and row.compute is UNSET for row in rows)
    assert {claim.verdict for claim in claims(rows, both[1])} == {"not told"}
    assert not fits(grid(Known()))[1].untold


def test_the_command_writes_a_fit_that_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = grid(Known(), noise=5e-4)
    for record in records:
        write_record(record, tmp_path / "records" / f"{record.name}.json")
    assert read_records(tmp_path / "records") == sorted(records, key=lambda record: record.name)
    line = ["law", "fit", str(tmp_path / "records"), "--starts", "16", "--resamplings", "50"]
    assert run(line) == 0
    said = capsys.readouterr().out
    assert "| 8M | 8,051,200 | 32 | 200,000,000 |" in said
    assert "without ratio 16: off by" in said
    report = read_report(tmp_path / "fit.json")
    known = fit(read_records(tmp_path / "records"), "joint", starts=16, resamplings=50, seed=0)
    again = fit_of(report, "joint")
    assert (again.theta_P == known.theta_P).all()
    assert (again.sampled_QP == known.sampled_QP).all()
    assert again.form == known.form
    for row in report.leverages:
        for estimate in row.forms.values():
            assert estimate.low < estimate.value < estimate.high  # type: ignore[operator]


def test_a_missing_run_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no records"):
        read_records(tmp_path)
    record = grid(Known())[0]
    write_record(record, tmp_path / "one.json")
    fields = json.loads((tmp_path / "one.json").read_text())
    assert "mfu" not in fields
    for broken in ({"loss": 0.0}, {"loss": None}, {"tokens": 0}, {"more": 1}):
        (tmp_path / "one.json").write_text(json.dumps(fields | broken))
        with pytest.raises(ConfigError, match="not the record of a run"):
            read_records(tmp_path)
    write_record(record, tmp_path / "one.json")
    write_record(record, tmp_path / "two.json")
    with pytest.raises(ConfigError, match="twice"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match="a loss of nan"):
        msgspec.structs.replace(record, loss=float("nan"))
