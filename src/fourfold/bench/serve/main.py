"""`fourfold bench serve`: prepares a load, runs it, shows and records what it found."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Coroutine

import uvloop
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from fourfold.bench.record import Record, check_out, check_writable, load, write
from fourfold.bench.serve.config import ServeBenchConfig
from fourfold.bench.serve.endpoint import Endpoint
from fourfold.bench.serve.http_client import HttpClient
from fourfold.bench.serve.load import arrival_times, closed_loop, open_loop, unless
from fourfold.bench.serve.measure import Outcome
from fourfold.bench.serve.prompts import make_requests
from fourfold.bench.serve.report import Report, make_record, show_curve, write_details
from fourfold.errors import ConfigError

INTERRUPTED = 130
"""Exit code of a run ended by Ctrl-C, as shells have it."""


async def run(
    config: ServeBenchConfig,
    *,
    stop: asyncio.Event | None = None,
    enough: asyncio.Event | None = None,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> Report:
    """Loads the server at one rate and reports. Setting `stop` ends it early, the report partial;
    setting `enough` ends the arrivals of an open loop, and waits for the answers to those that
    were. `on_outcome` hears of each measured request as it ends.

    ConfigError where the server cannot be reached or refuses a first request, or a file given is
    not what it should be. Failures under load are not errors but part of the report.
    """
    peer = _load_peer(config)
    http = HttpClient(config.base_url, api_key=config.api_key)
    try:
        endpoint = Endpoint(config, http)
        server = await endpoint.identify()
        requests = await make_requests(config, endpoint, server.model)
        measured = requests.bodies[: config.num_requests]
        notes = requests.notes + await _warm_up(config, endpoint, requests.bodies)
        outcomes: list[Outcome] = []

        def record(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if on_outcome is not None:
                on_outcome(outcome)

        work = _load(config, endpoint, measured, record, enough)
        started, cpu_started = time.perf_counter(), time.thread_time()
        await unless(stop or asyncio.Event(), work)
        duration = time.perf_counter() - started
        return Report(
            config=config,
            server=server,
            outcomes=tuple(outcomes),
            duration=duration,
            busy=(time.thread_time() - cpu_started) / duration,
            unfinished=len(measured) - len(outcomes),
            notes=notes,
            peer=peer,
        )
    finally:
        http.close()


def main(config: ServeBenchConfig) -> int:
    """Runs, prints the table on stdout and writes what was asked for.

    Returns 0, 1 where a request failed or not every rate could be run, or 130 after Ctrl-C. A
    second Ctrl-C leaves at once.
    """
    check_out(config.out, config.name)
    if config.details is not None:
        check_writable(config.details)
    for each in config.runs():
        _load_peer(each)
    _allow_many_connections()
    reports, stopped = uvloop.run(_interruptible(config))
    if not reports:
        print("interrupted before a request was measured", file=sys.stderr)
        return INTERRUPTED
    console = Console()
    for report in reports:
        report.show(console)
    if len(config.request_rate) > 1:
        show_curve(reports, console)
    if config.out is not None:
        write(make_record(config, reports), config.out)
    if config.details is not None:
        write_details(reports, config.details)
    if stopped:
        return INTERRUPTED
    failed = any(report.failed for report in reports)
    return 1 if failed or len(reports) < len(config.request_rate) else 0


async def _interruptible(config: ServeBenchConfig) -> tuple[list[Report], bool]:
    """`run` at every rate with a progress bar on stderr, ended early by Ctrl-C or by a server that
    can be asked no more; the reports that have anything to say, and whether it was Ctrl-C."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=2,  # drawing takes about a millisecond away from measuring
        disable=not console.is_terminal,
    )
    reports: list[Report] = []
    with bar:
        for each in config.runs():
            task = bar.add_task("preparing", total=each.num_requests)
            failed = 0

            def advance(outcome: Outcome, task: TaskID = task) -> None:
                nonlocal failed
                failed += outcome.failure is not None
                said = f"{failed} failed" if failed else "measuring"
                bar.update(task, advance=1, description=said)

            try:
                report = await run(each, stop=stop, on_outcome=advance)
            except ConfigError as error:
                if not reports:
                    raise
                # A server that broke under one rate has shown what it does at those before.
                print(f"{each.rate:g} req/s and what follows is left out: {error}", file=sys.stderr)
                break
            if reports and each.prompts_file is not None:
                again = "the prompts are those of the rates before: a prefix cache has held them"
                report = dataclasses.replace(report, notes=(*report.notes, again))
            reports.append(report)
            if stop.is_set():
                break
    return [report for report in reports if report.outcomes], stop.is_set()


def _load(
    config: ServeBenchConfig,
    endpoint: Endpoint,
    bodies: tuple[bytes, ...],
    record: Callable[[Outcome], None],
    enough: asyncio.Event | None,
) -> Coroutine[None, None, None]:
    if config.concurrency is not None:
        return closed_loop(endpoint.ask, bodies, config.concurrency, record)
    rng = random.Random(f"arrivals {config.seed}")
    times = arrival_times(len(bodies), config.rate, config.burstiness, rng)
    return open_loop(endpoint.ask, bodies, times, record, enough)


async def _warm_up(
    config: ServeBenchConfig, endpoint: Endpoint, bodies: tuple[bytes, ...]
) -> tuple[str, ...]:
    """Sends the warm-up's requests; says so where some of them failed."""
    bodies = bodies[config.num_requests :]
    outcomes: list[Outcome] = []
    if bodies:
        await closed_loop(endpoint.ask, bodies, config.concurrency or len(bodies), outcomes.append)
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    if not failures:
        return ()
    first = failures[0]
    return (f"{len(failures)} warm-up requests failed, the first by {first.kind}: {first.detail}",)


def _load_peer(config: ServeBenchConfig) -> tuple[str, Record] | None:
    """The peer's record. ConfigError where it is of another load than this run's."""
    if config.peer is None:
        return None
    name, _, path = config.peer.partition("=")
    record = load(path)
    cases = sorted({result.case for result in record.results})
    if config.describe() not in cases:
        raise ConfigError(
            f"--peer {path} holds {', '.join(cases)}, not {config.describe()}; "
            "give both runs the same load, or the same --case"
        )
    return name, record


def _allow_many_connections() -> None:
    """Raises this process's limit on open files as far as it may."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (limit, most):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
