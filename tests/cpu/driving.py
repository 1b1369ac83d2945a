"""Drives an engine step by step, without its thread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.messages import SamplingParams, Submit, TokenOutput
from fourfold.engine.runner import Runner
from fourfold.models.checkpoint.source import find_source
from fourfold.models.decoder import Decoder
from fourfold.models.loading import LoadOptions, load_model, pages_of
from fourfold.models.precision import Precision

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def load_tiny(path: Path, device: str = "cpu") -> Decoder:
    options = LoadOptions(device=torch.device(device), precision=Precision.FLOAT32)
    return load_model(find_source(str(path)), options)


def page_gib(model: Decoder, pages: int) -> float:
    """The --kv-memory-gib that makes exactly this many float32 pages."""
    config = model.config
    page = 2 * config.layers * config.kv_heads * 64 * config.head_width * 4
    return pages * page / 2**30


def make_engine(model: Decoder, *, pages: int = 64, **options: object) -> Engine:
    config = EngineConfig(kv_memory_gib=page_gib(model, pages), **options)
    return Engine(Runner(model, config, pages_of(model, config.kv_pages)), config)


def submit(request_id: int, prompt: Sequence[int], params: SamplingParams, n: int = 1) -> Submit:
    return Submit(request_id=request_id, prompt_ids=tuple(prompt), sampling=params, n=n)


def run(engine: Engine, requests: Sequence[Submit]) -> dict[tuple[int, int], list[TokenOutput]]:
    """Everything each (request, sample) was told until the engine had nothing left to do."""
    for request in requests:
        engine.submit(request)
    news: dict[tuple[int, int], list[TokenOutput]] = defaultdict(list)
    for _ in range(10_000):
        outputs = [*(engine.receive() or ()), *(engine.step() or ())]
        for output in outputs:
            news[output.request_id, output.index].append(output)
        if engine.idle:
            return news
    raise AssertionError("the engine never became idle")


def tokens(outputs: Sequence[TokenOutput]) -> list[int]:
    return [output.token for output in outputs if output.token is not None]


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY
) -> list[list[int]]:
    """The answers to prompts that arrive together."""
    news = run(engine, [submit(i, prompt, params) for i, prompt in enumerate(prompts)])
    return [tokens(news[i, 0]) for i in range(len(prompts))]
