"""The quality benchmark: its figures beside transformers' on the same windows, and its options."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tests.cpu.gateway import made_tokenizers

from fourfold.bench.quality.config import QualityBenchConfig
from fourfold.bench.quality.main import main
from fourfold.bench.quality.needles import hide_needles
from fourfold.bench.record import Result, load
from fourfold.errors import ConfigError
from fourfold.models.precision import PageFormat, Precision

FAMILY = "qwen3-moe-wide"
WORDS = ("the rain on a tin roof, ", "and her hat in the sea; ", "no answer at the station. ")


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("quality") / "model"
    shutil.copytree(checkpoint(FAMILY), folder)
    return made_tokenizers.write_default(folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(WORDS[n % 3] * (1 + n % 2) for n in range(12)))
    return path


def figures(path: Path) -> dict[tuple[str, str], Result]:
    return {(result.case, result.metric): result for result in load(path).results}


def test_perplexity_is_that_of_the_texts_own_tokens(
    model: Path,
    text: Path,
    tmp_path: Path,
    reference: Callable[[str], transformers.PreTrainedModel],
) -> None:
    out = tmp_path / "record.json"
    config = QualityBenchConfig(
        model=str(model), precision=Precision.W8A8, text=text, windows=3, window_tokens=40, out=out
    )
    assert main(config) == 0
    ids = made_tokenizers.load(model).encode(text.read_text(), add_special_tokens=False)
    stride, losses = len(ids) // 3, []
    for start in (0, stride, 2 * stride):
        window = torch.tensor([ids[start : start + 40]])
        with torch.inference_mode():
            scores = reference(FAMILY)(window).logits[0, :-1].double().log_softmax(-1)
        losses.append(-scores.gather(1, window[0, 1:, None]))
    exact = math.exp(torch.cat(losses).mean())
    found = figures(out)
    assert found["float32", "perplexity"].value == pytest.approx(exact, rel=1e-4)
    rounded = found["w8a8", "perplexity"].value
    assert rounded != found["float32", "perplexity"].value
    more = 100 * (rounded / exact - 1)
    assert found["w8a8", "over float32"].value == pytest.approx(more, abs=0.1)
    assert found["w8a8", "tokens read"].value == 3 * 39
    assert 50 < found["w8a8", "same likeliest"].value <= 100


def test_a_fact_is_hidden_and_asked_for(model: Path, text: Path) -> None:
    tokenizer = made_tokenizers.load(model)
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False)
    places = []
    for needle in hide_needles(ids, tokenizer, count=2, length=200):
        assert len(needle.tokens) == 200
        number = tokenizer.decode(needle.tokens[-needle.answer :])
        asked = tokenizer.decode(needle.tokens[: -needle.answer])
        assert len(number.strip()) == 5
        assert number.strip().isdigit()
        assert asked.count(number) == 1
        assert asked.endswith(" library is")
        places.append(asked.index(number))
    assert places[0] < places[1]


def test_a_model_of_random_weights_finds_no_fact(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    config = QualityBenchConfig(
        model=str(model),
        precision=Precision.FLOAT32,
        kv_pages=PageFormat.INT8,
        text=text,
        windows=1,
        window_tokens=8,
        needles=2,
        needle_tokens=150,
        out=out,
    )
    assert main(config) == 0
    found = figures(out)
    for case in ("float32", "float32, int8 pages"):
        assert found[f"{case}, 2 facts in 150 tokens", "facts found"].value == 0


def test_a_text_need_not_hold_facts_that_are_not_asked_for(
    model: Path, text: Path, tmp_path: Path
) -> None:
    sizes = {"windows": 1, "window_tokens": 8, "precision": Precision.W8A8}
    assert main(QualityBenchConfig(model=str(model), text=text, **sizes)) == 0  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2048 are asked for"):
        main(QualityBenchConfig(model=str(model), text=text, needles=1, **sizes))  # type: ignore[arg-type]


def test_float32_is_not_compared_with_itself(model: Path, text: Path) -> None:
    config = QualityBenchConfig(model=str(model), precision=Precision.FLOAT32, text=text)
    with pytest.raises(ConfigError, match="would be read in float32 twice; give another"):
        main(config)
