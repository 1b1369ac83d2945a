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
    with pytest.raises(CheckpointError):
        load_model(find_source(str(path)), LoadOptions(precision=Precision.FLOAT32))


def test_a_dummy_answers(bare: Callable[[str], Path]) -> None:
    [answer] = generate(make_engine(load(bare("mixtral"), uniform=True)), [[5, 6, 7]])
    assert len(answer) == 24


def test_uniform_routing_needs_a_dummy() -> None:
    with pytest.raises(ConfigError, match="--load dummy"):
        LoadOptions(uniform_routing=True)


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "olmoe"])
def test_uniform_routing_is_even_and_the_same_for_all_tokens(
    family: str, bare: Callable[[str], Path]
) -> None:
    model = load(bare(family), uniform=True)
    routers = [block.ffn.router for block in model.layers if isinstance(block.ffn, SparseFFN)]
    assert routers
    tokens = 4096
    for router in routers:
        routing = router(torch.randn(tokens, model.config.width))
        gates, experts = routing.gates_TK, routing.experts_TK
        again = router(torch.zeros(tokens, model.config.width)).experts_TK
        assert torch.equal(experts, again)
        chosen = experts.sort(-1).values
        assert (chosen.diff(dim=-1) > 0).all(), "a token goes to different experts"
        torch.testing.assert_close(gates.sum(-1), torch.ones(tokens))
        loads = experts.flatten().bincount(minlength=router.config.experts).float()
        assert (loads / loads.mean() - 1).abs().max() < 0.1
    first, second = (
        router(torch.zeros(64, model.config.width)).experts_TK for router in routers[:2]
    )
    assert not torch.equal(first, second), "layers route differently"
