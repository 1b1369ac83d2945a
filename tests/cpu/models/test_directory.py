"""Folders of safetensors: whole, in shards, in several dtypes, and with something wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint.source import find_source
from fourfold.models.decoder import Decoder
from fourfold.models.loading import LoadOptions, load_model
from fourfold.models.precision import Precision
from tests.cpu import tiny
from tests.cpu.driving import load_tiny
from tests.cpu.models.computing import PROMPT, logits

Find = Callable[[str], Path]
Edit = Callable[[dict[str, Tensor]], None]
WEIGHTS = "model.safetensors"


@pytest.fixture
def edited(checkpoint: Find, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint whose tensors were changed."""

    def make(family: str, edit: Edit) -> Path:
        path = tmp_path / family
        shutil.copytree(checkpoint(family), path)
        tensors = load_file(path / WEIGHTS)
        edit(tensors)
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        return path

    return make


def assert_same(one: Decoder, other: Decoder) -> None:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_tiny(path)
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_tensor_arrives(
    family: str,
    checkpoint: Find,
    reference: Callable[[str], transformers.PreTrainedModel],
) -> None:
    model = load_tiny(checkpoint(family))
    assert not any(parameter.is_meta for parameter in model.parameters())
    with torch.inference_mode():
        wanted = reference(family)(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits(model, PROMPT), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_shards(
    family: str,
    checkpoint: Find,
    reference: Callable[[str], transformers.PreTrainedModel],
    tmp_path: Path,
) -> None:
    reference(family).save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    save_file({"stray": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert_same(load_tiny(tmp_path), load_tiny(checkpoint(family)))
    shards[1].unlink()
    assert shards[1].name in refusal(tmp_path)


@pytest.mark.parametrize("index", ["{", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_a_broken_index_is_named(index: str, edited: Callable[..., Path]) -> None:
    path = edited("llama", lambda tensors: None)
    (path / f"{WEIGHTS}.index.json").write_text(index)
    assert "index.json" in refusal(path)


def test_tensors_that_do_not_fit_are_named(edited: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.self_attn.q_proj.weight"]
        tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(3)
        tensors["model.norm.weight"] = torch.ones(63)

    said = refusal(edited("llama", edit))
    assert "1 tensors missing: model.layers.1.self_attn.q_proj.weight" in said
    assert "1 tensors not used: model.layers.0.mlp.extra.weight" in said
    assert "model.norm.weight is [63], not [64]" in said
    assert "fetch it again" in said


def test_many_missing_tensors_stay_one_line(edited: Callable[..., Path]) -> None:
    path = edited("mixtral", lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_local_experts": 40}))
    said = refusal(path)
    assert "missing" in said
    assert "misshapen" in said
    assert len(said) < 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama-bias-rope3", "mixtral"])
def test_other_dtypes_become_float32(
    family: str, dtype: torch.dtype, checkpoint: Find, edited: Callable[..., Path]
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    model = load_tiny(edited(family, edit))
    whole = load_tiny(checkpoint(family))
    for (name, one), (_, other) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert one.dtype == torch.float32, name
        assert torch.equal(one, other.to(dtype).float()), name


def test_weights_in_integers_are_not_taken_for_numbers(edited: Callable[..., Path]) -> None:
    """Codes of some quantisation whose config.json does not say so."""

    def edit(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = (tensors[name] * 100).to(torch.int8)

    assert "up_proj" in refusal(edited("llama", edit))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16, Precision.W8A8])
def test_weights_that_are_no_numbers_are_named(
    value: float, precision: Precision, edited: Callable[..., Path]
) -> None:
    """Even of an expert that few tokens meet."""
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 5] = value

    source = find_source(str(edited("mixtral", edit)))
    with pytest.raises(CheckpointError, match=rf"{name} .* not finite"):
        load_model(source, LoadOptions(precision=precision))


def test_what_needs_no_place_is_passed_over(checkpoint: Find, edited: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    assert_same(load_tiny(edited("llama", edit)), load_tiny(checkpoint("llama")))


@pytest.mark.parametrize("rows", [320, 300])
def test_a_head_of_its_own_beside_tied_embeddings_is_named(
    rows: int, edited: Callable[..., Path]
) -> None:
    """Which of the two is meant nobody can tell, and both are in use."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][:rows] * 1.01

    said = refusal(edited("llama", edit))
    assert "lm_head.weight" in said
    assert "tie_word_embeddings" in said


def test_a_head_beside_untied_embeddings_is_needed(edited: Callable[..., Path]) -> None:
    assert "lm_head.weight" in refusal(
        edited("qwen3", lambda tensors: tensors.pop("lm_head.weight"))
    )


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_progress_grows_to_its_total(family: str, edited: Callable[..., Path]) -> None:
    """A bar that stops short of its end looks like a program that hangs."""

    def edit(tensors: dict[str, Tensor]) -> None:
        if family == "llama":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    steps: list[tuple[int, int]] = []
    options = LoadOptions(precision=Precision.FLOAT32)
    source = find_source(str(edited(family, edit)))
    load_model(source, options, lambda done, total: steps.append((done, total)))
    done = [step for step, _ in steps]
    totals = {total for _, total in steps}
    assert done == sorted(done)
    assert totals == {done[-1]}


def test_a_file_cut_short_is_named(edited: Callable[..., Path]) -> None:
    path = edited("llama", lambda tensors: None)
    file = path / WEIGHTS
    whole = file.read_bytes()
    for length in (0, 5, 200, len(whole) - 10):
        file.write_bytes(whole[:length])
        assert WEIGHTS in refusal(path)


def test_a_folder_of_another_format_says_what_to_do(edited: Callable[..., Path]) -> None:
    path = edited("llama", lambda tensors: None)
    (path / WEIGHTS).rename(path / "pytorch_model.bin")
    assert "safetensors" in refusal(path)


@pytest.mark.parametrize(
    "config", ["", "{", "[1, 2]", "null", '{"model_type": "llama"}', "[" * 100_000]
)
def test_a_broken_configuration_is_named(config: str, edited: Callable[..., Path]) -> None:
    path = edited("llama", lambda tensors: None)
    (path / "config.json").write_text(config)
    refusal(path)


def test_a_tensor_in_two_files_is_refused(edited: Callable[..., Path]) -> None:
    """Which of them is meant nobody can tell, and the two may differ."""
    path = edited("llama", lambda tensors: None)
    shutil.copyfile(path / WEIGHTS, path / "model.fp16.safetensors")
    said = refusal(path)
    assert WEIGHTS in said
    assert "model.fp16.safetensors" in said
