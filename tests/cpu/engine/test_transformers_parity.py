"""Logits and greedy tokens equal those of transformers, however the work is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
import transformers

from fourfold.engine.engine import Engine
from fourfold.quadrants.kv_pages import FloatPages, PageShape, Span
from fourfold.quadrants.step import lay_out
from tests.cpu import tiny
from tests.cpu.driving import GREEDY, generate, load_tiny, make_engine

Find = Callable[[str], Path]
Reference = Callable[[str], transformers.PreTrainedModel]
FAMILIES = sorted(tiny.FAMILIES)


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


def expected(
    model: transformers.PreTrainedModel, prompt: list[int], tokens: int = GREEDY.max_tokens
) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_chunks_and_of_decoding(
    family: str, checkpoint: Find, reference: Reference
) -> None:
    model = load_tiny(checkpoint(family))
    shape = PageShape(
        layers=model.config.layers,
        kv_heads=model.config.kv_heads,
        head_width=model.config.head_width,
        dtype=torch.float32,
    )
    pages = FloatPages(shape, 8, torch.device("cpu"))
    [prompt] = random_prompts(150)
    table = [5, 0, 3]
    hidden = []
    cuts = [0, 70, 128, 148, 149, 150]  # chunks, then two tokens as decoding computes them
    with torch.inference_mode():
        for start, end in itertools.pairwise(cuts):
            span = [Span(start, end - start, table)]
            rows = ([], span) if end - start > 1 else (span, [])
            step = lay_out(pages, *rows, heads=model.config.query_heads)
            ids = torch.tensor(prompt[start:end])
            hidden.append(model(ids, step.positions_T, step))
        logits = model.logits(torch.cat(hidden))
        wanted = reference(family)(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str, checkpoint: Find, reference: Reference) -> None:
    """A ragged batch, long prompts in chunks, a second round from the prefix cache."""
    prompts = random_prompts(1, 5, 63, 64, 65, 200)
    wanted = [expected(reference(family), prompt) for prompt in prompts]
    model = load_tiny(checkpoint(family))
    engine = make_engine(model, max_running=4, step_tokens=50)
    assert generate(engine, prompts) == wanted
    assert engine.stats.cached_tokens == 0
    assert generate(engine, prompts) == wanted
    assert engine.stats.cached_tokens == 64 + 64 * 3  # prompts of 65 and of 200 tokens
    assert engine.stats.pages_in_use == 0


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_greedy_tokens_survive_preemption(
    family: str, checkpoint: Find, reference: Reference
) -> None:
    """Five samples that come to need three pages each, of six."""
    params = msgspec.structs.replace(GREEDY, max_tokens=140)
    prompts = random_prompts(8, 10, 40, 50, 20)
    wanted = [expected(reference(family), prompt, 140) for prompt in prompts]
    engine = make_engine(load_tiny(checkpoint(family)), pages=6, prefix_cache=False)
    assert generate(engine, prompts, params) == wanted
    assert engine.stats.preemptions > 0
    assert engine.scheduler.pool.available == 6


def test_a_full_prompt_hit_still_computes_its_last_token(
    checkpoint: Find, reference: Reference
) -> None:
    [prompt] = random_prompts(128)
    engine: Engine = make_engine(load_tiny(checkpoint("mixtral")))
    wanted = expected(reference("mixtral"), prompt)
    assert generate(engine, [prompt]) == [wanted]
    assert generate(engine, [prompt]) == [wanted]
    assert engine.stats.cached_tokens == 64
