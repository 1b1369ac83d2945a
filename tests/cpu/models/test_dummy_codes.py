"""Quantised models of random codes, and models of the first layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fourfold.models.checkpoint.source import find_source
from fourfold.models.decoder import Decoder
from fourfold.models.layers import DenseFFN, SparseFFN
from fourfold.models.loading import LoadOptions, load_model
from fourfold.models.precision import Precision
from fourfold.models.router import UniformRouter
from fourfold.quantize.weights import W8A8Weight
from tests.cpu import tiny
from tests.cpu.models.computing import PROMPT, logits

Find = Callable[[str], Path]


@pytest.mark.parametrize("precision", [Precision.W8A8, Precision.W4A8])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_random_codes_answer_and_repeat(
    family: str, precision: Precision, checkpoint: Find, tmp_path: Path
) -> None:
    """Of nothing but a configuration; hidden states stay of one size from layer to layer."""
    (tmp_path / "config.json").write_bytes((checkpoint(family) / "config.json").read_bytes())
    options = LoadOptions(precision=precision, dummy=True)
    first, second = (load_model(find_source(str(tmp_path)), options) for _ in range(2))
    assert not any(parameter.is_meta for parameter in first.parameters())
    wanted = logits(first, PROMPT)
    assert torch.equal(wanted, logits(second, PROMPT))
    assert wanted.isfinite().all()
    assert 0.01 < wanted.std().item() < 10


@pytest.mark.parametrize("dummy", [False, True])
def test_every_last_product_of_an_ffn_reads_turned_activations(
    dummy: bool, checkpoint: Find
) -> None:
    """That of shared experts too, as `fourfold quantize` writes it."""
    options = LoadOptions(precision=Precision.W8A8, dummy=dummy)
    model = load_model(find_source(str(checkpoint("glm4-moe"))), options)
    dense, sparse = model.blocks[0].ffn, model.blocks[1].ffn
    assert isinstance(dense, DenseFFN)
    assert isinstance(sparse, SparseFFN)
    assert sparse.shared is not None
    for weight in (dense.down.weight, sparse.shared.down.weight):
        assert isinstance(weight, W8A8Weight)
        assert weight.turn is not None
    for reader in (dense.gate_up.weight, sparse.shared.gate_up.weight):
        assert isinstance(reader, W8A8Weight)
        assert reader.turn is None


def load(path: Path, **options: bool) -> tuple[Decoder, list[Decoder]]:
    """A model, and what was given of its first layers."""
    given: list[Decoder] = []
    asked = LoadOptions(precision=Precision.FLOAT32, **options)
    return load_model(find_source(str(path)), asked, first_layers=given.append), given


def test_first_layers_are_one_of_each_kind_and_share_the_weights(checkpoint: Find) -> None:
    model, [part] = load(checkpoint("qwen3-moe"))
    sparse, dense = model.layers[0], model.layers[1]
    assert isinstance(sparse.ffn, SparseFFN)
    assert isinstance(dense.ffn, DenseFFN)
    assert list(part.layers) == [sparse, sparse, dense, dense, sparse], "each after each"
    assert part.head is model.head
    assert part.embedding is model.embedding


def test_first_layers_compute_before_the_others_are_there(checkpoint: Find) -> None:
    answers: list[Tensor] = []
    options = LoadOptions(precision=Precision.FLOAT32)
    source = find_source(str(checkpoint("mixtral")))

    def compute(part: Decoder) -> None:
        assert [block.layer for block in part.blocks] == [0, 0]
        answers.append(logits(part, PROMPT))

    model = load_model(source, options, first_layers=compute)
    [answer] = answers
    assert answer.isfinite().all()
    assert not torch.equal(answer, logits(model, PROMPT))


def test_first_layers_route_as_the_model_does(checkpoint: Find) -> None:
    _, [part] = load(checkpoint("mixtral"), dummy=True, uniform_routing=True)
    assert isinstance(part.blocks[0].ffn.router, UniformRouter)
