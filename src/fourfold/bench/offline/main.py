"""Takes turns between the engines, each in a fresh process, and records the medians."""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys

import msgspec
import torch  # noqa: F401 (the record names the GPUs that an imported torch sees)

from fourfold.bench.command_line import command_line
from fourfold.bench.figures import format_figure
from fourfold.bench.offline.config import OfflineBenchConfig
from fourfold.bench.offline.engines import Figures, Task
from fourfold.bench.record import DEFAULT_PACKAGES, Result, new_record, write
from fourfold.errors import ConfigError

_LONGEST = 600
_PACKAGES = {
    "transformers": ("transformers", "transformers"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
}


def main(config: OfflineBenchConfig) -> int:
    """Runs the benchmark, prints its table and writes its record."""
    for peer in config.peers:
        module, package = _PACKAGES[peer]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{peer} is not installed; run `pip install {package}`")
    engines = ("fourfold", *config.peers)
    runs: dict[str, list[Figures]] = {engine: [] for engine in engines}
    for number in range(config.rounds):
        for engine in engines:
            print(f"round {number + 1} of {config.rounds}: {engine}", file=sys.stderr)
            runs[engine].append(_run(engine, config))
    results = _results(config, runs)
    _show(results)
    if config.out is not None:
        packages = (*DEFAULT_PACKAGES, "llama-cpp-python")
        record = new_record(
            config.name,
            command_line("fourfold bench offline", config, positional="model"),
            results,
            packages=packages,
        )
        write(record, config.out)
    return 0


def _run(engine: str, config: OfflineBenchConfig) -> Figures:
    task = Task(
        engine=engine,
        model=config.model,
        precision=config.precision,
        kv_pages=config.kv_pages,
        dummy=config.load == "dummy",
        uniform_routing=config.routing == "uniform",
        prompt_tokens=config.prompt_tokens,
        batch=config.batch,
        batch_prompt_tokens=config.batch_prompt_tokens,
        output_tokens=config.output_tokens,
    )
    done = subprocess.run(
        [sys.executable, "-m", "fourfold.bench.offline.engines"],
        input=msgspec.json.encode(task),
        capture_output=True,
        timeout=_LONGEST,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ConfigError(f"{engine} could not be measured: {lines[-1]}")
    return msgspec.json.decode(done.stdout, type=Figures)


def _results(config: OfflineBenchConfig, runs: dict[str, list[Figures]]) -> list[Result]:
    prompt = f"{config.prompt_tokens} tokens"
    cases = {
        "ready": ("start to ready", "ready", "s"),
        "prefill": (f"prompt of {prompt}", "prefill", "tok/s"),
        "first_token": (f"prompt of {prompt}", "first token", "s"),
        "decode": (f"batch 1 after {prompt}", "decode", "tok/s"),
        "decode_batch": (
            f"batch {config.batch} after {config.batch_prompt_tokens} tokens",
            "decode",
            "tok/s",
        ),
    }
    results = []
    for field, (case, metric, unit) in cases.items():
        ours = _median(runs["fourfold"], field)
        assert ours is not None
        result = Result(case=case, metric=metric, value=ours, unit=unit)
        theirs = [
            msgspec.structs.replace(result, peer=runs[peer][0].version, peer_value=figure)
            for peer in config.peers
            if (figure := _median(runs[peer], field)) is not None
        ]
        results.extend(theirs or [result])
    return results


def _median(runs: list[Figures], field: str) -> float | None:
    figures = [figure for run in runs if (figure := getattr(run, field)) is not None]
    return statistics.median(figures) if figures else None


def _show(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "metric", "fourfold", "peer", box=None)
    for result in results:
        peer = ""
        if isinstance(result.peer_value, float):
            peer = f"{format_figure(result.peer_value, result.unit)} ({result.peer})"
        table.add_row(result.case, result.metric, format_figure(result.value, result.unit), peer)
    Console().print(table)
