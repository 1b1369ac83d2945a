"""The least time that a case can take: its bytes at the speed of a copy, or its products at that of
the fastest 8-bit product of cuBLAS, as `fourfold calibrate` measured them on this GPU."""

from __future__ import annotations

import msgspec
import torch

from fourfold.bench.figures import format_figure
from fourfold.bench.offline.cases import LONG_ANSWER, SHORT_ANSWER, Case, Kind
from fourfold.bench.record import Result
from fourfold.models.config import ModelConfig
from fourfold.models.footprint import EXPERTS, footprint
from fourfold.models.storage import Storage
from fourfold.quadrants.costs import Limits, prefill_attention_work, touched_experts
from fourfold.quadrants.kv_pages import PAGE_TOKENS, PageShape


def with_floor(
    result: Result,
    case: Case,
    config: ModelConfig,
    storage: Storage,
    pages: PageShape,
    limits: Limits,
) -> Result:
    """A figure of a case on a GPU beside what its bytes or its products take at least."""
    if case.kind is Kind.DECODE and result.metric == "tpot":
        read = decode_bytes(case, config, storage, pages)
        speed = format_figure(limits.bandwidth / 1e12, "TB/s")
        name = f"{format_figure(read / 1e9, 'GB')} at {speed}"
        return msgspec.structs.replace(result, limit=read / limits.bandwidth, limit_name=name)
    if case.kind is Kind.PREFILL and result.metric == "prefill" and storage.precision.quantised:
        tokens = case.requests * case.prompt_tokens
        seconds = prefill_operations(case, config) / limits.operations
        name = f"8-bit products at {format_figure(limits.operations / 1e12, 'TFLOP/s')}"
        return msgspec.structs.replace(result, limit=tokens / seconds, limit_name=name)
    return result


def decode_bytes(case: Case, config: ModelConfig, storage: Storage, pages: PageShape) -> float:
    """Bytes that a decode step reads halfway through the answers: the weights that its tokens need,
    if they choose experts evenly, and their keys and values. Scales of output channels, less than
    half a percent, are left out."""
    read = 0.0
    for part in footprint(config):
        parameters = float(part.active)
        moe = config.moe
        if part.name == EXPERTS and moe is not None:
            expert = (part.total - part.active) / max(1, moe.experts - moe.experts_per_token)
            touched = touched_experts(case.requests, moe.experts, moe.experts_per_token)
            parameters += (touched - moe.experts_per_token) * expert
            # Whatever the experts are in, routers stay in float32.
            routers = sum(map(config.is_sparse, range(config.layers))) * moe.experts * config.width
            parameters -= routers
            read += routers * torch.float32.itemsize
        read += parameters * storage.bytes_read(part.name)
    context = case.prompt_tokens + (SHORT_ANSWER + LONG_ANSWER) / 2
    return read + case.requests * context * pages.page_bytes / PAGE_TOKENS


def prefill_operations(case: Case, config: ModelConfig) -> float:
    """Operations of all prompts, 2 per multiply-add: every token's products, and attention. The
    head is needed once a prompt, so it does not count."""
    active = sum(part.active for part in footprint(config) if "head" not in part.name)
    attention = prefill_attention_work(
        [(case.prompt_tokens, 0)] * case.requests,
        heads=config.query_heads,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
    )
    tokens = case.requests * case.prompt_tokens
    return 2.0 * tokens * active + config.layers * attention.operations
