"""Takes turns between the engines, each in a fresh process, and records the medians."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec
import torch

from fourfold.bench.answers import command_of
from fourfold.bench.command_line import command_line
from fourfold.bench.offline.cases import parse_case
from fourfold.bench.offline.config import OfflineBenchConfig
from fourfold.bench.offline.marks import load_marks, with_marks
from fourfold.bench.offline.task import Answer, Task
from fourfold.bench.record import DEFAULT_PACKAGES, Result, check_out, new_record, write
from fourfold.bench.tables import make_columns
from fourfold.errors import ConfigError
from fourfold.models.checkpoint.source import SourceKind, find_source
from fourfold.models.loading import open_checkpoint

_LONGEST = 1200
_LOG_WIDTH = 200
_PACKAGES = {
    "transformers": ("transformers", "'fourfold[transformers]'"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
}


def main(config: OfflineBenchConfig) -> int:
    """Runs the benchmark, prints its table and writes its record."""
    check_out(config.out, config.name)
    for peer in config.peers:
        module, package = _PACKAGES[peer]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{peer} is not installed; run `pip install {package}`")
    if config.profiles is not None and not torch.cuda.is_available():
        raise ConfigError("--profiles are of a GPU and torch finds none; leave them out")
    cases = tuple(map(parse_case, config.cases))
    marks = None if config.marks is None else load_marks(config.marks, cases)
    source = find_source(config.model)
    if config.peers and source.kind is SourceKind.DIRECTORY:
        raise ConfigError(f"--peers read GGUF files, not {source.path}; leave them out")
    vocabulary = int(open_checkpoint(source).fields()["vocab_size"])
    answers: dict[str, list[Answer]] = {engine: [] for engine in ("fourfold", *config.peers)}
    for number in range(config.rounds):
        for engine, given in answers.items():
            print(f"round {number + 1} of {config.rounds}: {engine}", file=sys.stderr)
            given.append(_run(engine, config, vocabulary))
    results = merge(answers)
    if marks is not None:
        results = with_marks(results, marks)
    _show(results)
    if config.out is not None:
        record = new_record(
            config.name,
            command_line("fourfold bench offline", config, positional="model"),
            results,
            packages=(*DEFAULT_PACKAGES, "llama-cpp-python"),
        )
        write(record, config.out)
    return 0


def _run(engine: str, config: OfflineBenchConfig, vocabulary: int) -> Answer:
    task = Task(
        engine=engine,
        started=time.time(),
        model=config.model,
        vocabulary=vocabulary,
        precision=config.precision,
        kv_pages=config.kv_pages,
        dummy=config.load == "dummy",
        uniform_routing=config.routing == "uniform",
        cases=tuple(map(parse_case, config.cases)),
        max_running=config.max_running,
        step_tokens=config.step_tokens,
        mixed_tokens=config.mixed_tokens,
        kv_memory_gib=config.kv_memory_gib,
        profiles=None if config.profiles is None else str(config.profiles),
    )
    try:
        done = subprocess.run(
            command_of("fourfold.bench.offline.engines"),
            input=msgspec.json.encode(task),
            stdout=subprocess.PIPE,
            timeout=_LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{engine} did not end in {_LONGEST} s; measure fewer --cases in one run"
        ) from error
    if done.returncode:
        raise ConfigError(f"{engine} could not be measured, it says why above")
    return msgspec.json.decode(done.stdout, type=Answer)


def merge(answers: dict[str, list[Answer]]) -> list[Result]:
    """Our medians over the rounds, each beside every peer's that has the same figure."""
    ours, *peers = (_medians(given) for given in answers.values())
    versions = [given[0].version for given in answers.values()][1:]
    results = []
    for figure, result in ours.items():
        theirs = [
            msgspec.structs.replace(result, peer=version, peer_value=peer[figure].value)
            for version, peer in zip(versions, peers, strict=True)
            if figure in peer
        ]
        results.extend(theirs or [result])
    return results


def _medians(rounds: Sequence[Answer]) -> dict[tuple[str, str], Result]:
    """The figures of an engine by case and metric; those of every round that has them."""
    figures: dict[tuple[str, str], list[Result]] = {}
    for answer in rounds:
        for result in answer.results:
            figures.setdefault((result.case, result.metric), []).append(result)
    return {
        figure: msgspec.structs.replace(
            results[0], value=statistics.median(result.value for result in results)
        )
        for figure, results in figures.items()
    }


def _show(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = make_columns(results)
    table = Table(*columns, box=None)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    console = Console()
    # In a log nothing needs to fit a screen.
    console.print(table, width=None if console.is_terminal else _LOG_WIDTH)
