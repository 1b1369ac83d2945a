"""What `inspect` counts is what a model holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourfold.models.checkpoint.source import find_source
from fourfold.models.config import ModelConfig
from fourfold.models.decoder import Decoder
from fourfold.models.footprint import EXPERTS, footprint
from fourfold.models.layers import SparseFFN
from fourfold.models.loading import LoadOptions, load_model, open_checkpoint, read_model_config
from fourfold.models.precision import Precision
from fourfold.models.storage import Storage
from tests.cpu import tiny


def read_config(path: Path) -> ModelConfig:
    checkpoint = open_checkpoint(find_source(str(path)))
    _, config = read_model_config(checkpoint.fields(), checkpoint.where)
    return config


def held(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Decoder(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    return count - config.vocabulary * config.width * config.tied_embeddings


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_totals_are_those_of_the_model(family: str, checkpoint: Callable[[str], Path]) -> None:
    config = read_config(checkpoint(family))
    assert sum(part.total for part in footprint(config)) == held(config)
    shared = config.moe and dataclasses.replace(config.moe, shared_width=40)
    assert shared is None or sum(
        part.total for part in footprint(dataclasses.replace(config, moe=shared))
    ) == held(dataclasses.replace(config, moe=shared))


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "olmoe"])
def test_a_token_passes_its_experts_only(family: str, checkpoint: Callable[[str], Path]) -> None:
    config = read_config(checkpoint(family))
    assert config.moe is not None
    [part] = [part for part in footprint(config) if part.name == EXPERTS]
    with torch.device("meta"):
        model = Decoder(config)
    sparse = [block.ffn for block in model.layers if isinstance(block.ffn, SparseFFN)]
    routers = sum(ffn.router.weight.numel() for ffn in sparse)
    experts = sum(p.numel() for ffn in sparse for p in ffn.experts.parameters())
    assert part.total == experts + routers
    share = config.moe.experts_per_token / config.moe.experts
    assert part.active == experts * share + routers


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_bytes_are_those_of_the_loaded_model(
    family: str, precision: Precision, checkpoint: Callable[[str], Path]
) -> None:
    model = load_model(find_source(str(checkpoint(family))), LoadOptions(precision=precision))
    parts = footprint(model.config)
    storage = Storage(precision, on_gpu=False)
    told = sum(part.total * storage.bytes_held(part.name) for part in parts)
    tensors = {p.data_ptr(): p for p in model.parameters()}  # a tied head is held once
    routers = [p for p in tensors.values() if p.shape == (4, model.config.width)]
    # Routers stay float32 in every precision; they are too small for `inspect` to tell apart.
    kept = sum(p.nbytes - p.numel() * precision_bytes(precision) for p in routers)
    assert told == sum(p.nbytes for p in tensors.values()) - kept


def precision_bytes(precision: Precision) -> int:
    return 2 if precision is Precision.BFLOAT16 else 4
