"""A quantised layer on a GPU computes what its codes stand for, as far as kernels are allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.bench.quality.layers import main
from fourfold.bench.quality.layers_config import LayersBenchConfig
from fourfold.models.precision import PageFormat, Precision
from tests.cpu import tiny


@pytest.mark.parametrize(
    ("precision", "kv_pages"),
    [(Precision.W4A8, PageFormat.INT8), (Precision.W4A8_FP8, PageFormat.FP8)],
)
@pytest.mark.parametrize("family", ["llama-wide", "qwen3-moe-wide"])
def test_every_layer_is_within_its_tolerance(
    family: str, precision: Precision, kv_pages: PageFormat, tmp_path: Path
) -> None:
    path = tiny.save_checkpoint(family, tmp_path / family)
    config = LayersBenchConfig(
        model=str(path), precision=precision, kv_pages=kv_pages, prompts=3, prompt_tokens=150
    )
    assert main(config) == 0
