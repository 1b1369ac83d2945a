"""`fourfold bench transport` sends what it says by both paths, and keeps the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.bench.record import load
from fourfold.bench.transport.config import TransportBenchConfig
from fourfold.bench.transport.main import main
from fourfold.errors import ConfigError


def test_a_small_run_leaves_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "transport.json"
    assert main(TransportBenchConfig(size=4, page_bytes=10_000, streams=2, rounds=1, out=out)) == 0
    record = load(out)
    assert (
        record.command
        == "fourfold bench transport --size 4 --page-bytes 10000 --streams 2 --rounds 1"
    )
    cases = {result.case.partition(",")[0] for result in record.results}
    assert cases == {"tcp x2", "shared memory"}
    rates = [result for result in record.results if result.metric == "rate"]
    assert all(isinstance(rate.peer_value, float) for rate in rates)
    assert [rate.unit for rate in rates] == ["GB/s"] * 4
    assert [rate.case.endswith("scattered") for rate in rates] == [False, False, True, True]
    assert "round_trip_p50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "--size"),
        ({"rounds": 0}, "--rounds"),
        ({"streams": 99}, "--streams"),
        ({"paths": ()}, "--paths"),
        ({"run_pages": (0,)}, "--run-pages"),
    ],
)
def test_options_that_measure_nothing_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TransportBenchConfig(**options)  # type: ignore[arg-type]
