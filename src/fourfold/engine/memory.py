"""How much memory the KV pages get: what is left once weights are loaded and a step has room."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.program import input_sizes, run_step
from fourfold.engine.sampler import Adjustment, Samples
from fourfold.engine.shortage import is_shortage
from fourfold.errors import ConfigError
from fourfold.kernels.staging import Staging
from fourfold.models.decoder import Decoder
from fourfold.quadrants.kv_pages import PAGE_TOKENS, KVPages, PageShape, Span, make_pages
from fourfold.quadrants.step import lay_out

logger = logging.getLogger(__name__)

_CPU_KV_GIB = 2.0
# Of what is available on a CPU, where that is less: steps need some too.
_CPU_SHARE = 0.75
# Of what is free; the rest is for what nobody foresees, such as other processes on the device.
_SHARE = 0.97
# Recorded graphs, tables of penalties, answers on their way to the host.
_BESIDE_GIB = 2.0
# Steps are recorded rounded up, and pieces of memory do not fit each other.
_WORKSPACE_SLACK = 1.4
_ASK_FOR_MORE = "raise --kv-memory-gib or lower --max-running"


def allocate_pages(
    model: Decoder, config: EngineConfig, shape: PageShape, *, shared: bool
) -> tuple[KVPages, int]:
    """The pages of an engine, and how many there are; on a GPU `shared` with other processes if
    asked for.

    Raises `ConfigError` where there is not enough.
    """
    device = model.frequencies.device
    workspace = _workspace(model, config, shape)
    size, remedy = _page_memory(config, device, workspace)
    count = int((size - config.running * shape.slot_bytes) // shape.page_bytes)
    if count < 2:
        raise ConfigError(
            f"{max(0, count)} KV pages of {shape.page_bytes / 2**20:.1f} MiB fit beside "
            f"{config.running} open ones; {remedy}"
        )
    try:
        pages = make_pages(shape, count, config.running, device, shared=shared)
    except (MemoryError, OverflowError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{size / 2**30:g} GiB of KV pages cannot be allocated on {device}; "
            "lower --kv-memory-gib"
        ) from error
    told = f"KV pages: {count} of {PAGE_TOKENS} tokens in {size / 2**30:.2f} GiB"
    if device.type == "cuda":
        step, free = workspace / 2**30, _free(device) / 2**30
        told += f"; the largest step takes {step:.2f} GiB, {free:.2f} GiB are free"
    logger.info("%s", told)
    return pages, count


def _page_memory(config: EngineConfig, device: torch.device, workspace: int) -> tuple[float, str]:
    """Bytes for pages, and what helps where they are too few. Raises `ConfigError` where a CPU has
    less than was asked for."""
    asked = config.kv_memory_gib
    if device.type == "cpu":
        return _host_page_memory(asked, available_memory())
    if asked is not None:
        return asked * 2**30, _ASK_FOR_MORE
    left = _free(device) - _WORKSPACE_SLACK * workspace - _BESIDE_GIB * 2**30
    return left * _SHARE, "lower --step-tokens or --max-running, or serve with --precision w4a8"


def _host_page_memory(asked: float | None, available: float) -> tuple[float, str]:
    """`_page_memory` on a CPU, by the GiB asked for and the bytes that are available. Pages take
    memory only when they are written: too many would end the process much later."""
    free = available / 2**30
    if asked is not None:
        if asked > free:
            raise ConfigError(
                f"--kv-memory-gib {asked:g} exceeds the {free:.2f} GiB of memory that are "
                "available; lower it"
            )
        return asked * 2**30, _ASK_FOR_MORE
    share = free * _CPU_SHARE
    if share >= _CPU_KV_GIB:
        return _CPU_KV_GIB * 2**30, _ASK_FOR_MORE
    logger.warning(
        "KV pages get %.2f GiB instead of %g, since %.2f GiB of memory are available; more with "
        "--kv-memory-gib",
        share,
        _CPU_KV_GIB,
        free,
    )
    return (
        share * 2**30,
        f"{free:.2f} GiB of memory are available; free some, or lower --max-running",
    )


@torch.inference_mode()
def _workspace(model: Decoder, config: EngineConfig, shape: PageShape) -> int:
    """Bytes that the largest step takes while it runs, found out by running one."""
    device = model.frequencies.device
    if device.type == "cpu":
        return 0
    rows, sampled = config.tokens, config.running
    pages = make_pages(shape, 1, 1, device)
    chunk = Span(0, rows, [0] * -(-rows // PAGE_TOKENS))
    step = lay_out(pages, [], [chunk], heads=model.config.query_heads)
    inputs = Staging(input_sizes(rows, sampled), device)
    samples = Samples(1, model.config.vocabulary, device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run_step(model, step, inputs, samples, adjustment=Adjustment.NONE)
        torch.cuda.synchronize(device)
    except Exception as error:
        if not is_shortage(error):
            raise
        raise ConfigError(
            f"a step of {rows} tokens does not fit beside the model; lower --step-tokens"
        ) from error
    return torch.cuda.max_memory_allocated(device) - before


def available_memory(system: Path = Path("/")) -> float:
    """Bytes of the host's memory that this process may still take: what Linux calls available, less
    where a control group limits it. Infinite where the system does not tell.

    Args:
        system: the folder that holds `proc` and `sys`.
    """
    try:
        known = _fields(system / "proc/meminfo")
    except OSError:
        return math.inf
    available = 1024 * known.get("MemAvailable:", math.inf)
    groups = system / "proc/self/cgroup"
    for group in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            root, files = "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root = "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        # A container may see the host's path, of which only the root is there.
        for folder in (Path(path), *Path(path).parents):
            left = _left_in_group(system / root / folder.relative_to("/"), *files)
            available = min(available, left)
    return max(0.0, available)


def _left_in_group(folder: Path, limit: str, usage: str, prefix: str) -> float:
    """Bytes that a control group may still take; files that are only cached count as free."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = _fields(folder / "memory.stat")
    except OSError:  # no limit can be set here, or nobody may look
        return math.inf
    if most == "max":
        return math.inf
    cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return int(most) - used + cached


def _fields(path: Path) -> dict[str, int]:
    """A file of lines that are a name, a number, and perhaps its unit."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in lines}


def _free(device: torch.device) -> int:
    """Bytes of a GPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free
