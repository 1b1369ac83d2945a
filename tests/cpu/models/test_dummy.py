"""Random weights for benchmarks: the same every time, and evenly routed only when asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourfold.errors import CheckpointError, ConfigError
from fourfold.models.checkpoint.source import find_source
from fourfold.models.decoder import Decoder
from fourfold.models.layers import SparseFFN
from fourfold.models.loading import LoadOptions, load_model
from fourfold.models.precision import Precision
from fourfold.models.router import Router
from tests.cpu import tiny
from tests.cpu.driving import generate, make_engine

Find = Callable[[str], Path]


def load(path: Path, *, uniform: bool = False) -> Decoder:
    options = LoadOptions(precision=Precision.FLOAT32, dummy=True, uniform_routing=uniform)
    return load_model(find_source(str(path)), options)


@pytest.fixture
def bare(checkpoint: Find, tmp_path: Path) -> Callable[[str], Path]:
    """A folder with nothing but a family's config.json."""

    def make(family: str) -> Path:
        (tmp_path / "config.json").write_bytes((checkpoint(family) / "config.json").read_bytes())
        return tmp_path

    return make


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_only_the_configuration_is_read_and_the_weights_repeat(
    family: str, bare: Callable[[str], Path]
) -> None:
    path = bare(family)
    first, second = load(path), load(path)
    for (name, one), (_, other) in zip(
        first.named_parameters(), second.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
        assert one.isfinite().all(), name
        assert not one.is_meta
    deviation = first.layers[0].attention.qkv.weight.weight.std().item()
    assert deviation == pytest.approx(0.02, rel=0.1)
    stored = {x.data_ptr(): x.flatten() for x in first.parameters()}
    drawn = [x for x in stored.values() if (x != x[0]).any()]
    assert len({tuple(x[:8].tolist()) for x in drawn}) == len(drawn) > 2, "no two are alike"
    with pytest.raises(CheckpointError):
        load_model(find_source(str(path)), LoadOptions(precision=Precision.FLOAT32))


def test_a_dummy_answers(bare: Callable[[str], Path]) -> None:
    [answer] = generate(make_engine(load(bare("mixtral"), uniform=True)), [[5, 6, 7]])
    assert len(answer) == 24


def test_uniform_routing_needs_a_dummy() -> None:
    with pytest.raises(ConfigError, match="--load dummy"):
        LoadOptions(uniform_routing=True)


def routers(model: Decoder) -> list[Router]:
    return [block.ffn.router for block in model.layers if isinstance(block.ffn, SparseFFN)]


def unevenness(experts: torch.Tensor, count: int) -> float:
    """How far the load of any expert is from the mean, as a share of it."""
    loads = experts.flatten().bincount(minlength=count).float()
    return float((loads / loads.mean() - 1).abs().max())


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "olmoe"])
def test_uniform_routing_is_even_and_heeds_no_token(
    family: str, bare: Callable[[str], Path]
) -> None:
    path = bare(family)
    first, second = load(path, uniform=True), load(path, uniform=True)
    tokens, width = 4096, first.config.width
    chosen = []
    for one, other in zip(routers(first), routers(second), strict=True):
        routing = one(torch.randn(tokens, width))
        experts_TK = routing.experts_TK.sort(-1).values
        assert torch.equal(experts_TK, other(torch.zeros(tokens, width)).experts_TK.sort(-1).values)
        assert (experts_TK.diff(dim=-1) > 0).all(), "no expert twice"
        assert unevenness(routing.experts_TK, one.config.experts) < 0.1
        chosen.append(routing.experts_TK)
    assert len(chosen) >= 2
    assert not torch.equal(chosen[0], chosen[1]), "layers route differently"


def test_uniform_routing_of_one_row_is_even_over_steps(bare: Callable[[str], Path]) -> None:
    """Decoding alone must not load the same two experts for ever."""
    model = load(bare("olmoe"), uniform=True)
    for router in routers(model):
        row = torch.zeros(1, model.config.width)
        steps = torch.cat([router(row).experts_TK for _ in range(2000)])
        assert unevenness(steps, router.config.experts) < 0.2
