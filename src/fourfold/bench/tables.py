"""Writes the tables of the README and other documents from the records under `benchmarks/results/`.

    python -m fourfold.bench.tables README.md docs/measured.md   # rewrite the tables
    python -m fourfold.bench.tables README.md --check            # exit 1 if they are not up to date

A table stands between two comments and shows every record of that name, or only some metrics of
it; `across` gives every case one line, with a column for each metric. What a person writes between
them is replaced, so a figure in a document cannot drift from the run that gave it.

    <!-- table:serve only: ttft_p50, output_rate -->
    <!-- /table:serve -->

    <!-- table:serve-rates across: output_rate, ttft_p50, ttft_p99 -->
    <!-- /table:serve-rates -->

A ratio says how many times *better* than the peer the figure is, whether it is a time or a size
(less is better) or a rate (more is better); it is left out for units that are neither.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from msgspec import UNSET

from fourfold.bench.figures import format_figure, ratio, significant
from fourfold.bench.record import Record, Result, load
from fourfold.errors import ConfigError
from fourfold.files import write_atomically

_TABLE = re.compile(
    r"(?P<opening><!-- table:(?P<name>[\w.-]+)(?: (?P<form>only|across): (?P<metrics>[^>]+?))? -->)"
    r"(?P<old>.*?)"
    r"(?P<closing><!-- /table:(?P=name) -->)",
    re.DOTALL,
)
_MARKER = re.compile(r"<!--\s*/?\s*table\s*:[^>]*>", re.IGNORECASE)
"""What looks like one, too: a table whose markers are misspelt would not be checked."""


def render(document: str, records: Sequence[Record]) -> str:
    """The document with every table made anew from `records`.

    ConfigError for a marker without its pair, or one that asks for what no record holds.
    """
    # Prose between an opening without its closing and the next table is nobody's old table.
    if stray := _MARKER.search(_TABLE.sub(r"\g<old>", document)):
        raise ConfigError(
            f"{stray[0]} is not a pair of <!-- table:NAME --> and <!-- /table:NAME --> markers"
        )

    def fill(match: re.Match[str]) -> str:
        metrics = [metric.strip() for metric in (match["metrics"] or "").split(",") if metric]
        tables = make_tables(match["name"], metrics, records, across=match["form"] == "across")
        return f"{match['opening']}\n{tables}\n{match['closing']}"

    return _TABLE.sub(fill, document)


def make_tables(
    name: str, metrics: Sequence[str], records: Sequence[Record], *, across: bool = False
) -> str:
    """A Markdown table for each record called `name`: all its metrics, or those listed, below each
    other or across."""
    chosen = [record for record in records if record.name == name]
    if not chosen:
        known = ", ".join(sorted({record.name for record in records})) or "none"
        raise ConfigError(f"no benchmark record is called {name!r} (there are: {known})")
    return "\n\n".join(_make_table(record, metrics, across) for record in chosen)


def _make_table(record: Record, metrics: Sequence[str], across: bool) -> str:
    results = [r for r in record.results if not metrics or r.metric in metrics]
    if missing := set(metrics) - {result.metric for result in results}:
        raise ConfigError(f"the record {record.name!r} holds no {', '.join(sorted(missing))}")
    used = _columns_across(results, metrics) if across else make_columns(results)
    lines = [tuple(used), ("---",) * len(used), *zip(*used.values(), strict=True)]
    table = "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)
    return f"{table}\n\n{_origin(record)}"


def make_columns(results: Sequence[Result]) -> dict[str, list[str]]:
    """The cells of a table of figures by heading; columns that would be empty are left out."""
    columns = {
        "case": [result.case for result in results],
        "metric": [result.metric for result in results],
        "value": [format_figure(result.value, result.unit) for result in results],
        "of the limit": [_of_limit(result) for result in results],
        "mark": [_mark(result) for result in results],
        "peer": [_peer(result) for result in results],
        "vs peer (>1 is better)": [_versus(result) for result in results],
    }
    return {heading: cells for heading, cells in columns.items() if any(cells)}


def _columns_across(results: Sequence[Result], metrics: Sequence[str]) -> dict[str, list[str]]:
    """The cells of a table with one line for each case."""
    figures = {
        (result.case, result.metric): format_figure(result.value, result.unit) for result in results
    }
    cases = list(dict.fromkeys(result.case for result in results))
    columns = {metric: [figures.get((case, metric), "") for case in cases] for metric in metrics}
    return {"case": cases, **columns}


def _of_limit(result: Result) -> str:
    if result.limit is UNSET:
        return ""
    share = ratio(result.value, result.limit, result.unit)
    limit = f"{format_figure(result.limit, result.unit)} ({result.limit_name})"
    return limit if share is None else f"{share:.0%} of {limit}"


def _mark(result: Result) -> str:
    if result.mark is UNSET:
        return ""
    mark = format_figure(result.mark, result.unit)
    times = ratio(result.value, result.mark, result.unit)
    return mark if times is None else f"{mark}, {'met' if times >= 1 else 'missed'}"


def _peer(result: Result) -> str:
    if result.peer_value is UNSET:
        return ""
    return f"{format_figure(result.peer_value, result.unit)} ({result.peer})"


def _versus(result: Result) -> str:
    if result.peer_value is UNSET:
        return ""
    times = ratio(result.value, result.peer_value, result.unit)
    return "" if times is None else f"{significant(times)}x"


def _origin(record: Record) -> str:
    hardware = record.hardware
    machine = f"{hardware.cpu}, {hardware.cores} cores, {hardware.memory_gib:g} GiB"
    devices = ", ".join([*hardware.gpus, machine])
    commit = "" if record.commit is UNSET else f" at commit `{_short(record.commit)}`"
    return f"`{record.command}`<br>{record.date:%Y-%m-%d}{commit} on {devices}."


def _short(commit: str) -> str:
    digits, dash, dirty = commit.partition("-")
    return digits[:10] + dash + dirty


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def load_records(folder: Path) -> list[Record]:
    """Every record in `folder`, in the order of their file names."""
    return [load(path) for path in sorted(folder.glob("*.json"))]


def main(
    documents: Annotated[tuple[Path, ...], tyro.conf.Positional],
    check: bool = False,
    results: Path | None = None,
) -> int:
    """Rewrites the tables of documents from benchmark records.

    Args:
        documents: Markdown files.
        check: Write nothing; exit 1 where one is not what the records say.
        results: The folder of records; by default the nearest benchmarks/results beside a
            document, or beside a folder that it is in.
    """
    stale = False
    for document in documents:
        try:
            before = document.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{document} cannot be read: {error}") from error
        after = render(before, load_records(results or _nearest_results(document)))
        if before == after:
            continue
        if check:
            stale = True
            print(
                f"{document} is not what its benchmark records say; "
                f"run python -m fourfold.bench.tables {document}",
                file=sys.stderr,
            )
        else:
            write_atomically(document, after.encode())
    return int(stale)


def _nearest_results(document: Path) -> Path:
    for folder in document.resolve().parents:
        if (found := folder / "benchmarks" / "results").is_dir():
            return found
    raise ConfigError(f"no folder above {document} has benchmarks/results; give --results")


if __name__ == "__main__":
    try:
        sys.exit(tyro.cli(main, config=(tyro.conf.FlagCreatePairsOff,)))
    except ConfigError as error:
        sys.exit(f"error: {error}")
