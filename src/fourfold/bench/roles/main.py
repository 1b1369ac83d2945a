"""`fourfold bench roles`: the same requests to several layouts of workers, in turns."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

import uvloop
from msgspec import UNSET
from rich.console import Console
from rich.table import Table

from fourfold.bench.figures import format_figure
from fourfold.bench.record import Result, check_out, new_record, write
from fourfold.bench.roles.config import RolesBenchConfig
from fourfold.bench.roles.serving import serving
from fourfold.bench.serve.config import ServeBenchConfig
from fourfold.bench.serve.main import run
from fourfold.bench.serve.measure import Outcome, spread
from fourfold.errors import FourfoldError

_PERCENTS = (50, 99)
_ROUNDS = 3
"""Answers that each stream gives, one after the other."""
_ARRIVING_SECONDS = 60.0
"""For so long prompts arrive at most, beside the streams."""


@dataclasses.dataclass
class Seen:
    """What became of the requests to one layout, over all turns."""

    lone: list[Outcome] = dataclasses.field(default_factory=list)
    quiet: list[Outcome] = dataclasses.field(default_factory=list)
    streams: list[Outcome] = dataclasses.field(default_factory=list)
    arriving: list[Outcome] = dataclasses.field(default_factory=list)


def main(config: RolesBenchConfig) -> int:
    """Runs, prints the table on stdout and writes the record if asked for. 1 where a request
    failed."""
    check_out(config.out, config.name)
    seen: dict[str, Seen] = defaultdict(Seen)
    for turn in range(config.turns):
        for layout in config.layouts:
            print(f"turn {turn + 1} of {config.turns}: {layout}", file=sys.stderr)
            with serving(config.serve(layout)) as url:
                time.sleep(config.settle)
                uvloop.run(_measure(config, url, turn, seen[layout]))
            for case, metric, value, unit in _figures(config, seen[layout]):
                print(f"  {case:<56} {metric:<16} {format_figure(value, unit)}", file=sys.stderr)
    results = list(_results(config, seen))
    _show(results)
    if config.out is not None:
        importlib.import_module("torch")  # so that the record names the GPUs that served
        write(new_record(config.name, config.command(), results), config.out)
    return 0


async def _measure(config: RolesBenchConfig, url: str, turn: int, seen: Seen) -> None:
    """One layout once; every request has a prompt of its own."""
    base = ServeBenchConfig(
        base_url=url, endpoint="completions", ignore_eos=True, seed=10 * turn, concurrency=1
    )
    seen.lone += await _outcomes(
        dataclasses.replace(
            base,
            num_requests=config.prompts,
            prompt_tokens=str(config.prompt_tokens),
            output_tokens="2",
        )
    )
    streams = dataclasses.replace(
        base,
        concurrency=config.streams,
        num_requests=_ROUNDS * config.streams,
        prompt_tokens="64",
        output_tokens=str(config.stream_tokens),
    )
    seen.quiet += await _outcomes(dataclasses.replace(streams, seed=base.seed + 1))
    arriving = dataclasses.replace(
        base,
        concurrency=None,
        request_rate=(config.arriving_rate,),
        num_requests=max(1, round(config.arriving_rate * _ARRIVING_SECONDS)),
        prompt_tokens=str(config.arriving_tokens),
        output_tokens="2",
        seed=base.seed + 2,
    )
    over = asyncio.Event()
    beside = asyncio.create_task(_outcomes(arriving, over))
    # Warm already: prompts are to arrive beside all streams, not beside a warm-up.
    streams = dataclasses.replace(streams, seed=base.seed + 3, warmup_requests=0)
    seen.streams += await _outcomes(streams)
    over.set()
    # Those that still wait have waited longest: without them the others would look good.
    arrived = await beside
    if not arrived:
        raise FourfoldError("the streams ended before a prompt arrived; raise --stream-tokens")
    if len(arrived) == arriving.num_requests:
        print(
            f"prompts arrived for {_ARRIVING_SECONDS:g} s, then streams ran alone; "
            "take fewer --stream-tokens",
            file=sys.stderr,
        )
    seen.arriving += arrived


async def _outcomes(config: ServeBenchConfig, enough: asyncio.Event | None = None) -> list[Outcome]:
    report = await run(config, enough=enough)
    if failures := [outcome.failure for outcome in report.outcomes if outcome.failure]:
        raise FourfoldError(f"{len(failures)} requests failed, the first: {failures[0].detail}")
    return list(report.outcomes)


def _results(config: RolesBenchConfig, seen: dict[str, Seen]) -> Iterator[Result]:
    """The figures of all layouts, each beside the first one's."""
    first = config.layouts[0]
    peers = {figure[:2]: figure[2] for figure in _figures(config, seen[first])}
    for layout in config.layouts:
        for case, metric, value, unit in _figures(config, seen[layout]):
            beside = layout != first and unit == "s"
            yield Result(
                case=f"{layout}: {case}",
                metric=metric,
                value=value,
                unit=unit,
                peer=first if beside else UNSET,
                peer_value=peers[case, metric] if beside else UNSET,
            )


def _figures(config: RolesBenchConfig, seen: Seen) -> Iterator[tuple[str, str, float, str]]:
    """(case, metric, value, unit); a 99th percentile of few is hardly more than the worst, so how
    many there were is a figure too."""
    lone = f"prompts of {config.prompt_tokens}, one by one"
    streams = f"{config.streams} streams"
    arriving = f"prompts of {config.arriving_tokens} at {config.arriving_rate:g}/s"
    cases = (
        (lone, "ttft", _ttft(seen.lone)),
        (f"{lone}, after the first token", "second_token", _seconds(seen.lone)),
        (f"{streams} alone", "itl", _gaps(seen.quiet)),
        (f"{streams} beside {arriving}", "itl", _gaps(seen.streams)),
        (f"{arriving} beside {streams}", "ttft", _ttft(seen.arriving)),
    )
    for case, metric, values in cases:
        if not values:
            raise FourfoldError(
                f"{case}: no token was seen by itself; is there text for every id in the model's "
                "tokenizer?"
            )
        percentiles = spread(values).percentiles
        for percent in _PERCENTS:
            yield case, f"{metric}_p{percent}", percentiles[percent], "s"
        yield case, "measured", len(values), "requests" if metric == "ttft" else "gaps"


def _ttft(outcomes: list[Outcome]) -> list[float]:
    return [outcome.ttft for outcome in outcomes if outcome.ttft is not None]


def _seconds(outcomes: list[Outcome]) -> list[float]:
    """From the first token to the second."""
    return [outcome.gaps[0] for outcome in outcomes if outcome.gaps]


def _gaps(outcomes: list[Outcome]) -> list[float]:
    return [gap for outcome in outcomes for gap in outcome.gaps]


def _show(results: list[Result]) -> None:
    table = Table("case", "metric", "value", "beside", "ratio")
    for result in results:
        row = [result.case, result.metric, format_figure(result.value, result.unit)]
        if result.peer_value is not UNSET:
            row += [
                f"{format_figure(result.peer_value, 's')} ({result.peer})",
                f"{result.value / result.peer_value:.2f}",
            ]
        table.add_row(*row)
    Console().print(table)
