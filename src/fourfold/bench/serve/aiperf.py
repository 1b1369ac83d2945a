"""What AIPerf, a load generator of somebody else's, found of a server, as one of our records.

    aiperf profile --model default --url http://127.0.0.1:8000 --streaming ...
    python -m fourfold.bench.serve.aiperf artifacts/.../profile_export_aiperf.json --out FILE

The record's command is AIPerf's own. Its "inter token latency" is what we call tpot (the mean of a
request), its "inter chunk latency" our itl.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import tyro

from fourfold.bench.record import Record, Result, check_out, new_record, write
from fourfold.bench.serve.measure import PERCENTILES
from fourfold.errors import ConfigError


class _Spread(msgspec.Struct, frozen=True):
    """Milliseconds."""

    avg: float
    p50: float
    p90: float
    p95: float
    p99: float


class _Number(msgspec.Struct, frozen=True):
    avg: float


class _Run(msgspec.Struct, frozen=True):
    cli_command: str


class _Export(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that we read of `profile_export_aiperf.json`."""

    aiperf_version: str
    run_info: _Run
    was_cancelled: bool
    start_time: str
    """UTC, ISO 8601 without a zone."""
    completed_request_count: _Number
    request_error_rate: _Number
    """Percent of the completed ones."""
    benchmark_duration: _Number
    request_throughput: _Number
    output_token_throughput: _Number
    input_sequence_length: _Number
    output_sequence_length: _Number
    time_to_first_token: _Spread
    inter_token_latency: _Spread
    inter_chunk_latency: _Spread
    request_latency: _Spread


def read_export(path: Path, name: str = "serve-aiperf", case: str | None = None) -> Record:
    """The record of a run of AIPerf on this machine. ConfigError for another file, or for a run
    that was cut short or did not stream."""
    try:
        export = msgspec.json.decode(path.read_bytes(), type=_Export)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not profile_export_aiperf.json of a streaming run ({error}); run "
            "`aiperf profile --streaming`"
        ) from error
    if export.was_cancelled:
        raise ConfigError(f"{path} is of a run that was cancelled; run AIPerf again")
    described = (
        f"{export.completed_request_count.avg:.0f} requests, "
        f"{export.input_sequence_length.avg:.0f} in, {export.output_sequence_length.avg:.0f} out"
    )
    results = [
        Result(case=case or described, metric=metric, value=value, unit=unit)
        for metric, value, unit in _figures(export)
    ]
    record = new_record(name, export.run_info.cli_command, results, packages=("fourfold",))
    date = datetime.datetime.fromisoformat(export.start_time).replace(tzinfo=datetime.UTC)
    return msgspec.structs.replace(
        record,
        date=date.replace(microsecond=0),
        software=record.software | {"aiperf": export.aiperf_version},
    )


def _figures(export: _Export) -> Iterator[tuple[str, float, str]]:
    """(metric, value, unit), named as those of `fourfold bench serve`."""
    ended = export.completed_request_count.avg
    failed = round(ended * export.request_error_rate.avg / 100)
    yield "completed", ended - failed, "requests"
    yield "failed", failed, "requests"
    yield "duration", export.benchmark_duration.avg, "s"
    yield "request_rate", export.request_throughput.avg, "req/s"
    yield "output_rate", export.output_token_throughput.avg, "tok/s"
    for name, spread in (
        ("ttft", export.time_to_first_token),
        ("tpot", export.inter_token_latency),
        ("itl", export.inter_chunk_latency),
        ("e2e", export.request_latency),
    ):
        yield f"{name}_mean", spread.avg / 1e3, "s"
        for percent in PERCENTILES:
            yield f"{name}_p{percent}", getattr(spread, f"p{percent}") / 1e3, "s"


def main(
    export: Annotated[Path, tyro.conf.Positional],
    out: Path,
    name: str = "serve-aiperf",
    case: str | None = None,
) -> int:
    """Writes what AIPerf found as a benchmark record.

    Args:
        export: Its profile_export_aiperf.json.
        out: Where the record goes.
        name: The record's name.
        case: What was asked of the server; by default requests and mean lengths.
    """
    check_out(out, name)
    write(read_export(export, name, case), out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main))
    except ConfigError as error:
        sys.exit(f"error: {error}")
