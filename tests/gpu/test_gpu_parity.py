"""On a GPU the engine answers as transformers does, in bfloat16 and however the work is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.messages import SamplingParams
from fourfold.engine.runner import Runner
from fourfold.models.checkpoint.source import find_source
from fourfold.models.loading import LoadOptions, load_model, pages_of
from fourfold.models.precision import Precision
from tests.cpu import tiny
from tests.cpu.driving import run, submit, tokens

GPU = torch.device("cuda:0")


@pytest.fixture(params=sorted(tiny.FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.save_checkpoint(request.param, tmp_path)


def make_engine(path: Path, precision: Precision) -> Engine:
    model = load_model(find_source(str(path)), LoadOptions(device=GPU, precision=precision))
    config = EngineConfig(kv_memory_gib=0.25, max_running=8, step_tokens=100)
    return Engine(Runner(model, config, pages_of(model, config.kv_pages)), config)


def test_logprobs_of_a_long_prompt(checkpoint: Path) -> None:
    """Teacher-forced log-probabilities, in chunks, against transformers in the same precision."""
    prompt = torch.randint(3, 320, (333,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, prompt_logprobs=True)
    news = run(make_engine(checkpoint, Precision.BFLOAT16), [submit(0, prompt, params)])
    ours = torch.tensor([entry.logprob for entry in news[0, 0][0].prompt_logprobs or ()])
    ids = torch.tensor([prompt], device=GPU)
    wanted = {}
    for dtype in (torch.bfloat16, torch.float32):
        reference = tiny.load_reference(checkpoint).to(GPU, dtype)
        with torch.inference_mode():
            scores = reference(ids).logits[0].float().log_softmax(-1)
        wanted[dtype] = scores[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1).cpu()
    # The median: where two experts score alike, rounding may choose the other one for a token.
    theirs = (wanted[torch.bfloat16] - wanted[torch.float32]).abs().median()
    error = (ours - wanted[torch.float32]).abs().median()
    assert error <= 1.5 * theirs + 1e-3, (
        f"{error:.4f} where transformers' bfloat16 has {theirs:.4f}"
    )


def test_every_way_of_asking_gives_an_answer(checkpoint: Path) -> None:
    """Ragged batch, chunks, sampling with every option, twice: the second time from the cache."""
    engine = make_engine(checkpoint, Precision.BFLOAT16)
    generator = torch.Generator().manual_seed(1)
    params = SamplingParams(
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        logit_bias={5: 1.0},
        seed=7,
        logprobs=3,
        max_tokens=20,
    )
    requests = [
        submit(i, torch.randint(3, 320, (n,), generator=generator).tolist(), params)
        for i, n in enumerate((1, 63, 64, 65, 250))
    ]
    for _ in range(2):
        news = run(engine, requests)
        assert [len(tokens(news[i, 0])) for i in range(5)] == [20] * 5
        assert engine.scheduler.pool.in_use == 0
    assert engine.stats.cached_tokens > 0
