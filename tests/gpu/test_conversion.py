"""Models converted on a GPU are those converted on a CPU, and are served packed as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.messages import SamplingParams
from fourfold.engine.runner import Runner
from fourfold.models.checkpoint.source import find_source
from fourfold.models.conversion.convert import Conversion, Texts
from fourfold.models.conversion.options import ConversionOptions
from fourfold.models.loading import LoadOptions, load_model, pages_of
from fourfold.models.precision import PageFormat, Precision
from tests.cpu import tiny
from tests.cpu.driving import run, submit

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen3-moe-wide", "llama-wide"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def tokens(windows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (windows, 64), generator=generator)


def convert(path: Path, out: Path, device: torch.device, recipe: str) -> tuple[float, list[float]]:
    """Perplexity after, and the relative errors of all products."""
    options = ConversionOptions(recipe=recipe)
    texts = Texts(tokens(16, 1), tokens(4, 2))
    errors: list[float] = []
    conversion = Conversion(find_source(str(path)), options, texts, out, device)
    report = conversion.run(lambda folder: None, lambda layer: errors.extend(layer.errors.values()))
    return report.after, errors


def logprobs(path: Path, device: torch.device, precision: Precision) -> torch.Tensor:
    """Of a prompt's own tokens, over pages that are not quantised."""
    model = load_model(find_source(str(path)), LoadOptions(device=device, precision=precision))
    config = EngineConfig(kv_memory_gib=0.25, kv_pages=PageFormat.FLOAT)
    engine = Engine(Runner(model, config, pages_of(model, config.kv_pages)), config)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, prompt_logprobs=True)
    news = run(engine, [submit(0, tokens(5, 3).flatten().tolist(), params)])
    return torch.tensor([entry.logprob for entry in news[0, 0][0].prompt_logprobs or ()])


@pytest.mark.parametrize("recipe", ["int8-g128", "fp8-g128"])
def test_converted_and_served_on_a_gpu(checkpoint: Path, recipe: str, tmp_path: Path) -> None:
    after, errors = convert(checkpoint, tmp_path / "gpu", GPU, recipe)
    on_cpu, errors_on_cpu = convert(checkpoint, tmp_path / "cpu", CPU, recipe)
    assert after == pytest.approx(on_cpu, rel=0.05)
    assert errors == pytest.approx(errors_on_cpu, rel=0.05)
    packed = logprobs(tmp_path / "gpu", GPU, Precision.AUTO)
    plain = logprobs(tmp_path / "gpu", CPU, Precision.FLOAT32)
    exact = logprobs(checkpoint, CPU, Precision.FLOAT32)
    cost = (plain - exact).abs().median()
    error = (packed - plain).abs().median()
    assert error < cost, f"{error:.4f} beside a quantisation error of {cost:.4f}"
