"""The README's tables: digits, directions, and a check that finds what drifted."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.bench.figures import format_figure, ratio, significant
from fourfold.bench.record import Hardware, Record, Result, write
from fourfold.bench.tables import main, render
from fourfold.errors import ConfigError

RECORD = Record(
    name="decode",
    command="fourfold bench decode --batch 1",
    commit="0123456789abcdef-dirty",
    date=datetime.datetime(2026, 11, 23, 12, tzinfo=datetime.UTC),
    hardware=Hardware(cpu="a CPU", cores=2, memory_gib=8.0, gpus=("a GPU",)),
    software={"python": "3.12.1"},
    results=(
        Result(
            case="a | b",
            metric="tpot",
            value=0.0024,
            unit="s",
            limit=0.0012,
            limit_name="weight bytes",
            peer="vLLM 0.23.0",
            peer_value=0.0048,
        ),
        Result(
            case="a | b",
            metric="rate",
            value=413.7,
            unit="tok/s",
            peer="vLLM 0.23.0",
            peer_value=827.4,
        ),
        Result(case="a | b", metric="failed", value=0, unit="requests"),
    ),
)

README = "# Title\n\n<!-- table:decode -->\nold\n<!-- /table:decode -->\n\ntail\n"

TABLE = """\
| case | metric | value | of the limit | peer | vs peer (>1 is better) |
| --- | --- | --- | --- | --- | --- |
| a \\| b | tpot | 2.40 ms | 50% of 1.20 ms (weight bytes) | 4.80 ms (vLLM 0.23.0) | 2.00x |
| a \\| b | rate | 414 tok/s |  | 827 tok/s (vLLM 0.23.0) | 0.500x |
| a \\| b | failed | 0 requests |  |  |  |

`fourfold bench decode --batch 1`<br>\
2026-11-23 at commit `0123456789-dirty` on a GPU, a CPU, 2 cores, 8 GiB."""


def test_render_fills_between_markers() -> None:
    rendered = render(README, [RECORD])
    assert rendered == README.replace("old", TABLE)
    assert render(rendered, [RECORD]) == rendered


def test_render_shows_only_what_is_asked_for() -> None:
    readme = "<!-- table:decode only: failed -->\n<!-- /table:decode -->"
    assert render(readme, [RECORD]).splitlines()[1:4] == [
        "| case | metric | value |",
        "| --- | --- | --- |",
        "| a \\| b | failed | 0 requests |",
    ]


def test_render_gives_each_case_a_line() -> None:
    results = [
        Result(case=case, metric=metric, value=value, unit="tok/s")
        for case, metric, value in (("a", "in", 1.0), ("a", "out", 2.0), ("b", "out", 3.0))
    ]
    record = Record(
        **{name: getattr(RECORD, name) for name in ("name", "command", "date", "hardware")},
        software={},
        results=tuple(results),
    )
    readme = "<!-- table:decode across: out, in -->\n<!-- /table:decode -->"
    assert render(readme, [record]).splitlines()[1:5] == [
        "| case | out | in |",
        "| --- | --- | --- |",
        "| a | 2.00 tok/s | 1.00 tok/s |",
        "| b | 3.00 tok/s |  |",
    ]


def test_marks_say_whether_they_are_met() -> None:
    results = tuple(
        Result(case="c", metric=metric, value=value, unit=unit, mark=2.0)
        for metric, value, unit in (("a", 1.0, "s"), ("b", 1.0, "tok/s"), ("c", 1.0, "%"))
    )
    record = Record(
        **{name: getattr(RECORD, name) for name in ("name", "command", "date", "hardware")},
        software={},
        results=results,
    )
    table = render(README, [record])
    assert "| c | a | 1.00 s | 2.00 s, met |" in table
    assert "| c | b | 1.00 tok/s | 2.00 tok/s, missed |" in table
    assert "| c | c | 1 % | 2 % |" in table


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("<!-- table:prefill -->\n<!-- /table:prefill -->", "no benchmark record .*'prefill'"),
        ("<!-- table:decode only: x -->\n<!-- /table:decode -->", "'decode' holds no x"),
        ("<!-- table:decode -->", "not a pair"),
        ("<!-- table:decode -->\n<!-- /table:prefill -->", "not a pair"),
        ("<!-- table:decode onyl: x -->\n<!-- /table:decode -->", "not a pair"),
        ("<!--table:decode-->\nby hand\n<!--/table:decode-->", "not a pair"),
        ("<!-- Table: decode -->\nby hand\n<!-- /Table: decode -->", "not a pair"),
        (f"<!-- table:decode -->\nclosing is lost; prose\n{README}", "not a pair"),
    ],
)
def test_render_refuses_what_it_cannot_fill(readme: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render(readme, [RECORD])


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.00479, "s", "4.79 ms"),
        (0.9996, "s", "1.00 s"),
        (1234.5, "s", "1,230 s"),
        (12.0, "us", "12.0 us"),
        (1500.0, "us", "1.50 ms"),
        (3e-10, "s", "0.300 ns"),
        (0.0, "s", "0 s"),
        (6484.2, "tok/s", "6,480 tok/s"),
        (99.96, "tok/s", "100 tok/s"),
        (0.0123456, "tok/s", "0.0123 tok/s"),
        (1024.0, "requests", "1,024 requests"),
        (2.0, "GiB", "2.00 GiB"),
    ],
)
def test_format_figure(value: float, unit: str, shown: str) -> None:
    assert format_figure(value, unit) == shown


@settings(derandomize=True, deadline=None)
@given(value=st.floats(min_value=1e-9, max_value=1e12), digits=st.integers(1, 6))
def test_significant_keeps_its_digits(value: float, digits: int) -> None:
    shown = significant(value, digits)
    assert "e" not in shown
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits))


@pytest.mark.parametrize("unit", ["s", "ms", "us/event", "ms/token", "GiB", "B/token"])
def test_less_is_better(unit: str) -> None:
    assert ratio(2.0, 4.0, unit) == 2.0


@pytest.mark.parametrize("unit", ["tok/s", "req/s", "GB/s", "tok/s/GPU", "TFLOPS"])
def test_more_is_better(unit: str) -> None:
    assert ratio(2.0, 4.0, unit) == 0.5


@pytest.mark.parametrize(
    ("value", "unit"), [(2.0, "%"), (2.0, "requests"), (2.0, "tokens/req"), (0.0, "s")]
)
def test_no_direction_no_ratio(value: float, unit: str) -> None:
    assert ratio(value, 4.0, unit) is None


def test_check_finds_drift_and_rewrite_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, deeper = documents = tmp_path / "README.md", tmp_path / "docs" / "measured.md"
    deeper.parent.mkdir()
    for document in documents:
        document.write_text(README)
    write(RECORD, tmp_path / "benchmarks" / "results" / "decode.json")
    assert main(documents, check=True) == 1
    assert capsys.readouterr().err.count("python -m fourfold.bench.tables") == 2
    assert readme.read_text() == README
    assert main(documents) == 0
    assert TABLE in readme.read_text()
    assert readme.read_text() == deeper.read_text()
    assert main(documents, check=True) == 0
    deeper.write_text(deeper.read_text().replace("2.40 ms", "1.40 ms"))
    assert main(documents, check=True) == 1
    assert main((readme,), check=True) == 0


def test_the_command_answers_errors_in_one_line(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    command = [sys.executable, "-m", "fourfold.bench.tables", str(readme), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: no benchmark record is called 'decode' (there are: none)\n"


def test_a_document_far_from_records_says_so(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    with pytest.raises(ConfigError, match="give --results"):
        main((readme,))
