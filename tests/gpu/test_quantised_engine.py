"""The whole engine over 8-bit pages, above all in 4-bit weights: a GPU answers as a CPU does with
the same codes, and however the work is cut."""

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
from fourfold.models.precision import PageFormat, Precision
from tests.cpu import tiny
from tests.cpu.driving import run, submit, tokens

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
LENGTH = 200
TEACHER_FORCED = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, prompt_logprobs=True)


@pytest.fixture(scope="module", params=["qwen3-moe-wide", "llama-wide"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def make_engine(
    path: Path,
    device: torch.device,
    precision: Precision = Precision.W4A8,
    kv_pages: PageFormat = PageFormat.INT8,
) -> Engine:
    model = load_model(find_source(str(path)), LoadOptions(device=device, precision=precision))
    config = EngineConfig(kv_memory_gib=0.25, max_running=8, step_tokens=200, kv_pages=kv_pages)
    return Engine(Runner(model, config, pages_of(model, kv_pages)), config)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (length,), generator=generator).tolist()


def logprobs(engine: Engine, length: int) -> torch.Tensor:
    news = run(engine, [submit(0, prompt(length), TEACHER_FORCED)])
    return torch.tensor([entry.logprob for entry in news[0, 0][0].prompt_logprobs or ()])


@pytest.fixture(scope="module")
def on_a_cpu(checkpoint: Path) -> dict[tuple[Precision, PageFormat], torch.Tensor]:
    """What a CPU computes with the same codes, and in float32."""
    kinds = [
        (Precision.FLOAT32, PageFormat.FLOAT),
        (Precision.W4A8, PageFormat.FLOAT),
        (Precision.W4A8, PageFormat.INT8),
    ]
    return {kind: logprobs(make_engine(checkpoint, CPU, *kind), LENGTH) for kind in kinds}


@pytest.mark.parametrize(
    ("precision", "kv_pages"),
    [
        (Precision.W4A8, PageFormat.INT8),
        (Precision.W4A8, PageFormat.FLOAT),
        (Precision.W4A8_FP8, PageFormat.FP8),
        (Precision.BFLOAT16, PageFormat.INT8),
    ],
)
def test_as_a_cpu_with_the_same_codes(
    checkpoint: Path,
    on_a_cpu: dict[tuple[Precision, PageFormat], torch.Tensor],
    precision: Precision,
    kv_pages: PageFormat,
) -> None:
    """FP8 has no form on a CPU: there it costs about what INT8 does. Weights of 16 bits over the
    same pages cost less."""
    engine = make_engine(checkpoint, GPU, precision, kv_pages)
    ours = logprobs(engine, LENGTH)
    assert (engine.stats.graphs > 0) == (kv_pages is not PageFormat.FLOAT)
    exact = on_a_cpu[Precision.FLOAT32, PageFormat.FLOAT]
    if precision is Precision.W4A8:
        wanted = on_a_cpu[precision, kv_pages]
        cost = (wanted - exact).abs().median()
        assert (ours - wanted).abs().median() < cost / 2
    else:
        cost = (on_a_cpu[Precision.W4A8, PageFormat.INT8] - exact).abs().median()
        most = cost / 2 if precision is Precision.BFLOAT16 else 2 * cost
        assert (ours - exact).abs().median() < most


def test_cuts_hardly_matter(checkpoint: Path) -> None:
    """Chunked with others, decoded, from the prefix cache: nearly the same log-probabilities."""
    engine = make_engine(checkpoint, GPU)
    greedy = SamplingParams(temperature=0.0, max_tokens=70, logprobs=0)
    lone = run(engine, [submit(0, prompt(150), greedy)])[0, 0]
    requests = [submit(i, prompt(150 if i == 3 else 40 * i + 1, i % 3), greedy) for i in range(6)]
    for _ in range(2):
        news = run(engine, requests)
        assert [len(tokens(news[i, 0])) for i in range(6)] == [70] * 6
        assert engine.scheduler.pool.in_use == 0
    first = [entry.logprob.logprob for entry in lone[:8] if entry.logprob]
    again = run(engine, [submit(9, prompt(150), greedy)])[9, 0]
    assert first == pytest.approx([e.logprob.logprob for e in again[:8] if e.logprob], abs=0.1)
