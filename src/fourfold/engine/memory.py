"""How much memory the KV pages get: what is left once weights are loaded and a step has room."""

from __future__ import annotations

import logging

import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.program import input_sizes, run_step
from fourfold.engine.sampler import Adjustment, Samples
from fourfold.errors import ConfigError
from fourfold.kernels.staging import Staging
from fourfold.models.decoder import Decoder
from fourfold.quadrants.kv_pages import PAGE_TOKENS, KVPages, PageShape, Span, make_pages
from fourfold.quadrants.step import lay_out

logger = logging.getLogger(__name__)

_CPU_KV_GIB = 2.0
# Of what is free; the rest is for what nobody foresees, such as other processes on the device.
_SHARE = 0.97
# Recorded graphs, tables of penalties, answers on their way to the host.
_BESIDE_GIB = 1.5
# Steps are recorded rounded up, and pieces of memory do not fit each other.
_WORKSPACE_SLACK = 1.4


def allocate_pages(
    model: Decoder, config: EngineConfig, shape: PageShape, *, shared: bool
) -> tuple[KVPages, int]:
    """The pages of an engine, and how many there are; on a GPU `shared` with other processes if
    asked for.

    Raises `ConfigError` where there is not enough.
    """
    device = model.frequencies.device
    workspace = _workspace(model, config, shape)
    size = _page_memory(config, device, workspace)
    count = int((size - config.running * shape.slot_bytes) // shape.page_bytes)
    if count < 2:
        raise ConfigError(
            f"{max(0, count)} KV pages of {shape.page_bytes / 2**20:.1f} MiB fit beside "
            f"{config.running} open ones; raise --kv-memory-gib or lower --max-running"
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


def _page_memory(config: EngineConfig, device: torch.device, workspace: int) -> float:
    if config.kv_memory_gib is not None:
        return config.kv_memory_gib * 2**30
    if device.type == "cpu":
        return _CPU_KV_GIB * 2**30
    left = _free(device) - _WORKSPACE_SLACK * workspace - _BESIDE_GIB * 2**30
    return left * _SHARE


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
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {rows} tokens does not fit beside the model; lower --step-tokens"
        ) from error
    return torch.cuda.max_memory_allocated(device) - before


def _free(device: torch.device) -> int:
    """Bytes of a GPU."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free
