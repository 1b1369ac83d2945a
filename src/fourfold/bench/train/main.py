"""Builds, warms up and times each engine, and records tokens/s, MFU and memory."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import msgspec
import torch

from fourfold.bench.command_line import command_line
from fourfold.bench.figures import result_line
from fourfold.bench.record import DEFAULT_PACKAGES, Result, check_out, new_record, write
from fourfold.bench.train.config import Form, TrainBenchConfig
from fourfold.bench.train.engines import Engine, Ours, check_peer, make_peer
from fourfold.errors import ConfigError
from fourfold.models.config import ModelConfig
from fourfold.models.loading import resolve_device
from fourfold.train.config import TrainConfig, read_config
from fourfold.train.metrics import peak_flops
from fourfold.train.model import count, model_config
from fourfold.train.parallel import joined

_GIB = 1 << 30
_MFU_MARK = 40.0
_SPEED_MARK = 1.3
"""Of the faster peer."""


def main(options: TrainBenchConfig) -> int:
    """Runs the benchmark, prints its figures and writes its record."""
    check_out(options.out, options.name)
    config = read_config(options.config, options.set)
    results = []
    with joined(config.parallel, resolve_device(config.run.device)) as parallel:
        if parallel.world > 1:
            raise ConfigError("steps are measured on one device; start it without torchrun")
        if options.peers and config.optimizer.kind != "adamw":
            raise ConfigError("peers take AdamW's steps; add --set optimizer.kind=adamw")
        for form in options.forms:
            _, model = _of_form(options, config, form)
            for peer in options.peers:
                check_peer(peer, model)
        for form in options.forms:
            for result in _measure_form(options, config, form, parallel.device):
                print(result_line(result, 24), flush=True)
                results.append(result)
    if options.out is not None:
        command = command_line("fourfold bench train", options, positional="config")
        packages = (*DEFAULT_PACKAGES, "torchtitan")
        write(new_record(options.name, command, results, packages=packages), options.out)
    return 0


def _of_form(
    options: TrainBenchConfig, config: TrainConfig, form: Form
) -> tuple[TrainConfig, ModelConfig]:
    section = msgspec.structs.replace(config.model, form=form)
    # No checkpoint of an earlier run may be continued.
    run = msgspec.structs.replace(config.run, folder="/nonexistent", start_from=None)
    vocabulary = section.vocabulary or options.vocabulary
    model = model_config(section, config.router, vocabulary, None)
    return msgspec.structs.replace(config, model=section, run=run), model


def _measure_form(
    options: TrainBenchConfig, config: TrainConfig, form: Form, device: torch.device
) -> list[Result]:
    config, model = _of_form(options, config, form)
    counts = count(model, config.data.length)
    case = (
        f"{form}, {counts.active / 1e6:.0f}M of {counts.total / 1e6:.0f}M active, rows of "
        f"{config.data.length}"
    )
    speeds: dict[str, float] = {}
    memory: dict[str, float] = {}
    peak = peak_flops(device)
    for name in ("fourfold", *options.peers):
        print(f"{case}: {name}", file=sys.stderr)
        try:
            rows, speed, most = _measure_fitting(name, options, config, model, device)
        except torch.OutOfMemoryError:
            if name == "fourfold":
                raise ConfigError(
                    f"{case} does not fit {device}; lower run.micro_rows or the model's size"
                ) from None
            print(f"{case}: {name} is left out: it does not fit", file=sys.stderr)
            continue
        except Exception as error:
            # What was measured is worth more than a peer of another release.
            if name == "fourfold":
                raise
            reason = f"{type(error).__name__}: {error}"
            print(f"{case}: {name} is left out: it fails ({reason})", file=sys.stderr)
            continue
        said = f"{speed:,.0f} tok/s"
        if peak is not None:
            said += f", MFU {speed * counts.flops_per_token / peak:.1%}"
        print(f"{case}: {name}: {said}", file=sys.stderr)
        whole = rows == _micro_rows(config)
        label = name if whole else f"{name}, micro-batches of {rows}"
        speeds[label], memory[label] = speed, most
    return _results(case, speeds, memory, counts.flops_per_token, peak)


def _micro_rows(config: TrainConfig) -> int:
    return config.run.micro_rows or config.data.rows


def _measure_fitting(
    name: str,
    options: TrainBenchConfig,
    config: TrainConfig,
    model: ModelConfig,
    device: torch.device,
) -> tuple[int, float, float]:
    """Rows of a micro-batch, tokens per second and the most memory in GiB. What does not fit takes
    its steps in smaller micro-batches, which is what anybody would do; ours does not."""
    tokens = config.data.rows * config.data.length
    rows = _micro_rows(config)
    while True:
        run = msgspec.structs.replace(config.run, micro_rows=rows)
        make = partial(_make, name, msgspec.structs.replace(config, run=run), model, device)
        try:
            return rows, *_measure(make, options, tokens, device)
        except torch.OutOfMemoryError:
            if name == "fourfold" or rows % 2:
                raise
            rows //= 2
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _make(name: str, config: TrainConfig, model: ModelConfig, device: torch.device) -> Engine:
    if name == "fourfold":
        return Ours(config, model, device)
    return make_peer(name, config, model, device)  # type: ignore[arg-type]  # a checked name


def _measure(
    make: Callable[[], Engine], options: TrainBenchConfig, tokens: int, device: torch.device
) -> tuple[float, float]:
    """Tokens per second, the median over the rounds, and the most memory in GiB."""
    on_gpu = device.type == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    engine = make()
    for _ in range(options.warmup):
        engine.step()
    speeds = []
    for _ in range(options.rounds):
        wait()
        begin = time.perf_counter()
        for _ in range(options.steps):
            engine.step()
        wait()
        speeds.append(tokens * options.steps / (time.perf_counter() - begin))
    most = torch.cuda.max_memory_allocated(device) / _GIB if on_gpu else 0.0
    return statistics.median(speeds), most


def _results(
    case: str,
    speeds: dict[str, float],
    memory: dict[str, float],
    flops_per_token: float,
    peak: float | None,
) -> list[Result]:
    ours = speeds["fourfold"]
    peers = {name: speed for name, speed in speeds.items() if name != "fourfold"}
    results = [Result(case=case, metric="tokens_per_second", value=ours, unit="tok/s")]
    if peers:
        mark = _SPEED_MARK * max(peers.values())
        results = [
            Result(
                case=case,
                metric="tokens_per_second",
                value=ours,
                unit="tok/s",
                mark=mark,
                peer=name,
                peer_value=speed,
            )
            for name, speed in peers.items()
        ]
    if peak is not None:
        mfu = 100 * ours * flops_per_token / peak
        results.append(Result(case=case, metric="mfu", value=mfu, unit="%", mark=_MFU_MARK))
    results += [
        Result(case=case, metric=f"memory of {name}", value=most, unit="GiB")
        for name, most in memory.items()
        if most
    ]
    return results
