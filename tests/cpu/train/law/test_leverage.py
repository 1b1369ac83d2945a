"""How many times larger a dense model must be: by fits, between runs, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from fourfold.cli.main import run
from fourfold.errors import ConfigError
from fourfold.train.law.fitting import Fit, fit
from fourfold.train.law.leverage import (
    Estimate,
    Leverage,
    claims,
    dense_equivalent,
    direct_leverage,
    leverages,
)
from fourfold.train.law.records import RunRecord, read_records, write_record
from fourfold.train.law.report import direct_verdict, fit_of, read_report
from tests.cpu.train.law.known import RATIOS, SPARSE, TOKENS, Known, grid

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


def longest(law: Known) -> list[RunRecord]:
    """The runs of a grid on the most tokens."""
    return [record for record in grid(law) if record.tokens == TOKENS[-1]]


@pytest.mark.parametrize("size", SPARSE)
@pytest.mark.parametrize("ratio", RATIOS)
def test_runs_themselves_say_the_leverage(size: int, ratio: int) -> None:
    law = Known()
    records = longest(law)
    sparse = [r for r in records if (r.model, r.ratio) == (f"{size}M", ratio)]
    times, above = direct_leverage(records, sparse)
    assert times == pytest.approx(law.leverage(size * 1e6, ratio), rel=0.02)
    assert above is None


def test_a_loss_below_all_dense_ones_says_what_the_leverage_is_more_than() -> None:
    records = longest(STRONG)
    best = [r for r in records if (r.model, r.ratio) == ("8M", 32)]
    assert direct_leverage(records, best) == (None, 64e6 / best[0].active)
    worst = msgspec.structs.replace(best[0], loss=9.0)
    assert direct_leverage(records, [worst]) == (None, None)


def test_dense_runs_that_went_wrong_make_no_leverage_larger() -> None:
    """A larger dense model that lost more is no peer, neither inside the sizes nor at their end."""
    law = Known()
    records = longest(law)
    sparse = [r for r in records if (r.model, r.ratio) == ("4M", 8)]
    times, _ = direct_leverage(records, sparse)
    for size in ("16M", "64M"):
        wrong = [
            msgspec.structs.replace(r, loss=r.loss + 0.3) if r.model == size else r for r in records
        ]
        other, _ = direct_leverage(wrong, sparse)
        assert other == pytest.approx(times, rel=0.05), size
    best = [msgspec.structs.replace(sparse[0], loss=1.8)]
    assert direct_leverage(wrong, best) == (None, 32e6 / best[0].active)


def test_interpolated_and_extrapolated_are_told_apart() -> None:
    records = grid(STRONG)
    found = leverages(records, fits(records))
    assert [row.tokens for row in found] == sorted(row.tokens for row in found)
    assert len(found) == len(TOKENS) * len(SPARSE) * len(RATIOS)
    rows = {(int(r.model[:-1]), r.ratio): r for r in found if r.tokens == TOKENS[-1]}
    assert set(rows) == {(size, ratio) for size in SPARSE for ratio in RATIOS}
    for (size, ratio), row in rows.items():
        times = STRONG.leverage(size * 1e6, ratio)
        assert row.interpolated == (size * times <= 64), (size, ratio)
        assert row.interpolated == (row.direct is not UNSET) == (row.above is UNSET)
        # A token costs as many FLOPs as 6 times active parameters and a million.
        dense = times * size + 1
        assert row.compute == pytest.approx(dense / (size + 1), rel=0.25)


def test_the_claim_of_seven_times_is_judged() -> None:
    def verdicts(law: Known) -> dict[int, list[str]]:
        records = grid(law)
        both = fits(records)
        found = claims(leverages(records, both), both[1])
        assert [claim.tokens for claim in found] == sorted(TOKENS * len(SPARSE))
        return {
            size: sorted({claim.verdict for claim in found if claim.model == f"{size}M"})
            for size in SPARSE
        }

    # At 8 million, the first ratio that reaches it is as good as 90 million dense ones.
    assert verdicts(STRONG) == {2: ["reached"], 4: ["reached"], 8: ["extrapolated"]}
    assert verdicts(Known(d=0.15, g=0.0)) == {size: ["foretold"] for size in SPARSE}
    assert verdicts(Known(d=0.02, g=0.0)) == {size: ["not reached"] for size in SPARSE}


def row(ratio: int, value: float, low: float, **more: Any) -> Leverage:
    """Of 2 million parameters."""
    estimate = Estimate(value=value, low=low, high=2 * value)
    fields = {"model": "2M", "active": 2_000_000, "tokens": TOKENS[0], "interpolated": True}
    return Leverage(**fields, ratio=ratio, forms={"joint": estimate}, **more)


def test_a_claim_is_sure_where_its_whole_interval_is() -> None:
    joint = fits(grid(Known()))[1]
    [claim] = claims([row(4, 5.0, 4.0), row(8, 7.5, 6.0)], joint)
    assert (claim.verdict, claim.ratio, claim.leverage.value) == ("perhaps", 8, 7.5)
    [claim] = claims([row(4, 5.0, 4.0), row(8, 7.5, 6.0), row(16, 9.0, 8.0)], joint)
    assert (claim.verdict, claim.ratio, claim.leverage.value) == ("reached", 16, 9.0)


@pytest.mark.parametrize(
    ("figures", "ratio", "said"),
    [
        (({"direct": 5.0}, {"direct": 8.0}, {"above": 9.0}), 8, "reached at ratio 8: 8"),
        (({"direct": 5.0}, {"above": 7.5}), 8, "reached at ratio 8: > 7.5"),
        (({"direct": 5.0}, {"above": 6.0}), 8, "not told at ratio 8: > 6"),
        (({"direct": 5.0}, {"direct": 3.0}), 4, "not reached at ratio 4: 5"),
        (({"above": 2.0}, {"direct": 3.0}), 4, "not told at ratio 4: > 2"),
        (({}, {}), None, "-"),
    ],
)
def test_dense_runs_judge_the_claim_too(
    figures: tuple[dict[str, float], ...], ratio: int | None, said: str
) -> None:
    rows = [row(4 << i, 2.0, 1.0, **more) for i, more in enumerate(figures)]
    [claim] = claims(rows, fits(grid(Known()))[1])
    assert (None if claim.direct is UNSET else claim.direct.ratio) == ratio
    assert direct_verdict(claim) == said


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
    assert "57 runs of 19 models, one seed" in said
    assert "1M to 64M active parameters, ratios 1, 4, 8, 16, 32, 50M to 200M tokens." in said
    assert "Doubt" not in said
    assert "| 8M | 8,051,200 | 32 | 200,000,000 |" in said
    assert "| 8M | 8,051,200 | 32 | 50,000,000 |" not in said
    assert "| 50M | 8M | not reached at ratio 32: " in said
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


def test_a_fit_is_replaced_only_where_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for record in grid(Known()):
        write_record(record, tmp_path / "records" / f"{record.name}.json")
    out = tmp_path / "fit.json"
    out.write_text("published")
    line = ["law", "fit", str(tmp_path / "records"), "--starts", "2", "--resamplings", "1"]
    assert run(line) == 2
    assert f"replace it with --out {out}" in capsys.readouterr().err
    assert out.read_text() == "published"
    assert run([*line, "--out", str(out)]) == 0
    assert read_report(out).forms


def test_runs_that_were_too_short_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the fit, and of what is drawn beside it and advised by it."""
    for record in grid(Known(), noise=5e-4):
        short = record.tokens < 60e6
        strange = msgspec.structs.replace(record, loss=record.loss * 1.3 if short else record.loss)
        write_record(strange, tmp_path / "records" / f"{record.name}.json")
    fitted = ["law", "fit", str(tmp_path / "records"), "--starts", "16", "--resamplings", "20"]
    assert run([*fitted, "--least-tokens", "60e6"]) == 0
    said = capsys.readouterr().out
    assert "38 runs of 19 models" in said
    assert "Runs on fewer than 60M tokens are left out." in said
    report = read_report(tmp_path / "fit.json")
    assert report.forms["joint"].error < 2e-3
    assert all(len(form.residuals) == 38 for form in report.forms.values())
    assert run(["law", "plot", str(tmp_path / "fit.json")]) == 0
    assert run(["law", "advise", str(tmp_path / "fit.json"), "--flops", "1e18"]) == 0
    other = ["--out", str(tmp_path / "other.json")]
    assert run([*fitted, *other, "--least-tokens", "1e12"]) != 0
    assert "lower --least-tokens" in capsys.readouterr().err


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
