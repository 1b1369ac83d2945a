"""AIPerf's export as a record. The figures are of a run of AIPerf 0.13.0 against a busy machine."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from fourfold.bench.record import load
from fourfold.bench.serve.aiperf import main, read_export
from fourfold.errors import ConfigError

COMMAND = "aiperf profile --model 'default' --url 'http://127.0.0.1:8131' --streaming"


def spread(avg: float, p50: float, p90: float, p95: float, p99: float) -> dict[str, Any]:
    return {"unit": "ms", "avg": avg, "p50": p50, "p90": p90, "p95": p95, "p99": p99, "count": 24}


EXPORT: dict[str, Any] = {
    "schema_version": "1.4",
    "aiperf_version": "0.13.0",
    "run_info": {"benchmark_id": "789ce945ed49", "cli_command": COMMAND},
    "was_cancelled": False,
    "start_time": "2026-11-24T19:33:51.599774",
    "completed_request_count": {"unit": "requests", "avg": 24.0},
    "request_error_rate": {"unit": "%", "avg": 12.5},
    "benchmark_duration": {"unit": "sec", "avg": 139.603720704},
    "request_throughput": {"unit": "requests/sec", "avg": 0.1719059018660266},
    "output_token_throughput": {"unit": "tokens/sec", "avg": 5.500988859712852},
    "input_sequence_length": {"unit": "tokens", "avg": 158.0, "p50": 158.0},
    "output_sequence_length": {"unit": "tokens", "avg": 32.0, "p50": 32.0},
    "time_to_first_token": spread(6198.4, 5313.1, 11141.4, 11157.5, 13408.6),
    "inter_token_latency": spread(549.3, 512.6, 859.8, 865.7, 865.8),
    "inter_chunk_latency": spread(553.0, 493.0, 1017.1, 1156.5, 1474.6),
    "request_latency": spread(23226.4, 22246.1, 37882.2, 37981.2, 37994.1),
}


@pytest.fixture
def export(tmp_path: Path) -> Path:
    path = tmp_path / "profile_export_aiperf.json"
    path.write_text(json.dumps(EXPORT))
    return path


def test_an_export_becomes_a_record(export: Path, tmp_path: Path) -> None:
    assert main(export, tmp_path / "record.json") == 0
    record = load(tmp_path / "record.json")
    assert (record.name, record.command) == ("serve-aiperf", COMMAND)
    assert record.date == datetime.datetime(2026, 11, 24, 19, 33, 51, tzinfo=datetime.UTC)
    assert record.software["aiperf"] == "0.13.0"
    assert {result.case for result in record.results} == {"24 requests, 158 in, 32 out"}
    figures = {result.metric: (result.value, result.unit) for result in record.results}
    assert figures["completed"] == (21, "requests")
    assert figures["failed"] == (3, "requests")
    assert figures["ttft_p99"] == (pytest.approx(13.4086), "s")
    assert figures["tpot_p50"] == (pytest.approx(0.5126), "s")
    assert figures["output_rate"] == (pytest.approx(5.500988859712852), "tok/s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"was_cancelled": True}, "was cancelled"),
        ({"time_to_first_token": None}, "of a streaming run"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], message: str, export: Path) -> None:
    export.write_text(json.dumps(EXPORT | change))
    with pytest.raises(ConfigError, match=message):
        read_export(export)
