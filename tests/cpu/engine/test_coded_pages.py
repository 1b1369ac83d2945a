"""The engine over 8-bit pages gives the same tokens however the work is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.runner import Runner
from fourfold.errors import ConfigError
from fourfold.models.decoder import Decoder
from fourfold.models.loading import pages_of
from fourfold.models.precision import PageFormat
from tests.cpu.driving import GREEDY, generate, load_tiny, run, submit, tokens

LENGTHS = (5, 64, 65, 130, 200, 60, 61, 62)


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Decoder:
    return load_tiny(checkpoint("qwen3-moe"))


def make_engine(model: Decoder, *, pages: int = 64, **options: object) -> Engine:
    """An engine over so many int8 pages."""
    shape = pages_of(model, PageFormat.INT8)
    config = EngineConfig(
        kv_pages=PageFormat.INT8,
        **{"max_running": 8, "step_tokens": 512} | options,  # type: ignore[arg-type]
    )
    size = pages * shape.page_bytes + config.max_running * shape.slot_bytes
    config = EngineConfig(**{**vars(config), "kv_memory_gib": size / 2**30})
    return Engine(Runner(model, config, shape), config)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(model: Decoder) -> list[list[int]]:
    engine = make_engine(model, prefix_cache=False)
    return [generate(engine, [prompt])[0] for prompt in prompts()]


@pytest.mark.parametrize("step_tokens", [72, 150, 512])
def test_together_in_chunks_and_from_the_cache(
    model: Decoder, alone: list[list[int]], step_tokens: int
) -> None:
    engine = make_engine(model, step_tokens=step_tokens)
    for _ in range(2):
        assert generate(engine, prompts()) == alone
        assert engine.scheduler.pool.in_use == 0
    assert engine.stats.cached_tokens > 0


def test_preempted(model: Decoder, alone: list[list[int]]) -> None:
    """Three prompts of nearly a page each, and too few pages for all of their answers."""
    engine = make_engine(model, pages=5, prefix_cache=False)
    assert generate(engine, prompts()[-3:]) == alone[-3:]
    assert engine.stats.preemptions > 0


def test_samples_share_their_prompt(model: Decoder, alone: list[list[int]]) -> None:
    engine = make_engine(model)
    news = run(engine, [submit(0, prompts()[4], GREEDY, n=3)])
    assert [tokens(news[0, index]) for index in range(3)] == [alone[4]] * 3


def test_a_step_too_small_for_a_page_is_refused(model: Decoder) -> None:
    with pytest.raises(ConfigError, match="must exceed --max-running 8 by 64"):
        make_engine(model, step_tokens=71)


def test_too_little_memory_is_refused(model: Decoder) -> None:
    with pytest.raises(ConfigError, match="raise --kv-memory-gib"):
        make_engine(model, pages=1)
