"""GGUF files answer as the checkpoints they were made from; what cannot is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint.gguf import GGUFCheckpoint
from fourfold.models.checkpoint.source import find_source
from fourfold.models.loading import LoadOptions, load_model
from fourfold.models.precision import Precision
from tests.cpu import tiny
from tests.cpu.driving import load_tiny
from tests.cpu.models import gguf_writing
from tests.cpu.models.computing import PROMPT, logits
from tests.cpu.models.gguf_writing import write_dequantised, write_gguf

SPARSE = {"num_experts_per_tok": 2, "num_experts": 4, "norm_topk_prob": True}
# What GGUF has no words for (clipping, dense layers between sparse ones) is left out.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-8-heads": ("Llama", {"num_attention_heads": 8}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-moe": ("Qwen3Moe", SPARSE | {"moe_intermediate_size": 64, "head_dim": 32}),
    "mixtral": ("Mixtral", {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "olmoe": ("Olmoe", SPARSE | {"norm_topk_prob": False}),
}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Hugging Face checkpoint of each of `MODELS`."""

    @functools.cache
    def make(name: str) -> Path:
        prefix, fields = MODELS[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(tiny.FAMILIES, name, (prefix, fields))
            return tiny.save_checkpoint(name, tmp_path_factory.mktemp(name))

    return make


def theirs(path: Path) -> torch.Tensor:
    """transformers' logits of the prompt."""
    model: transformers.PreTrainedModel = tiny.load_reference(path)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_tiny(path)
    said = str(caught.value)
    assert path.name in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"llama-linear"}))
def test_float32_is_the_checkpoint_itself(name: str, made: Made, tmp_path: Path) -> None:
    model = load_tiny(write_gguf(made(name), tmp_path / f"{name}.gguf"))
    directory = load_tiny(made(name))
    pairs = zip(model.named_parameters(), directory.named_parameters(), strict=True)
    for (parameter, one), (_, other) in pairs:
        assert torch.equal(one, other), parameter
    torch.testing.assert_close(logits(model, PROMPT), theirs(made(name)), rtol=1e-4, atol=1e-4)
    assert model.config.eos_token_ids == (2,)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0, Kind.Q5_1])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3-moe"])
def test_other_kinds_are_what_they_dequantise_to(
    name: str, kind: Kind, made: Made, tmp_path: Path
) -> None:
    model = load_tiny(write_gguf(made(name), tmp_path / f"{name}.gguf", kind))
    wanted = theirs(write_dequantised(made(name), tmp_path / "plain", kind))
    torch.testing.assert_close(logits(model, PROMPT), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, theirs(made(name)), rtol=1e-4, atol=1e-4)


def test_progress_grows_to_its_total(made: Made, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    load_model(
        find_source(str(write_gguf(made("mixtral"), tmp_path / "bar.gguf", Kind.Q8_0))),
        LoadOptions(precision=Precision.FLOAT32),
        lambda done, total: steps.append((done, total)),
    )
    done = [step for step, _ in steps]
    assert done == sorted(done)
    assert {total for _, total in steps} == {done[-1]}


def test_positions_scaled_linearly(made: Made, tmp_path: Path) -> None:
    checkpoint = made("llama-linear")
    scaled = write_gguf(
        checkpoint,
        tmp_path / "linear.gguf",
        add_rope_scaling_type=gguf.RopeScalingType.LINEAR,
        add_rope_scaling_factor=4.0,
    )
    wanted = theirs(checkpoint)
    for path in (checkpoint, scaled):
        torch.testing.assert_close(logits(load_tiny(path), PROMPT), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"add_sliding_window": 128}, "attention.sliding_window"),
        (
            {
                "add_rope_scaling_type": gguf.RopeScalingType.YARN,
                "add_rope_scaling_factor": 4.0,
            },
            "yarn",
        ),
        ({"add_logit_scale": 0.5}, "logit_scale"),
        ({"add_rope_dimension_count": 8}, "partial_rotary_factor = 0.5"),
        ({"add_key_length": 32}, "partial_rotary_factor = 0.5"),
        ({"add_key_length": 0}, "head_dim = 0"),
        ({"add_uint16": ("split.count", 3)}, "one of 3 parts"),
        ({"add_tensor": ("rope_freqs.weight", np.ones(8, np.float32))}, "rope_freqs"),
        ({"add_tensor": ("blk.0.attn_sinks.weight", np.ones(8, np.float32))}, "attn_sinks"),
        ({"add_tensor": ("blk.0.ffn_gate.0.weight", np.ones(8, np.float32))}, "ffn_gate.0"),
    ],
)
def test_what_we_would_not_compute_is_refused(
    extra: dict[str, Any], said: str, made: Made, tmp_path: Path
) -> None:
    assert said in refusal(write_gguf(made("llama"), tmp_path / "odd.gguf", **extra))


def test_biases_that_gguf_has_no_field_for_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("llama-bias-rope3")
    assert "bias" in refusal(write_gguf(source, tmp_path / "biased.gguf"))


def write_bare(path: Path, architecture: str, **tensors: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    said = refusal(write_bare(tmp_path / "other.gguf", "gemma3", a=np.ones(4, np.float32)))
    assert "gemma3" in said
    assert "olmoe" in said


def test_a_file_without_embeddings_is_refused(tmp_path: Path) -> None:
    refusal(write_bare(tmp_path / "empty.gguf", "llama", a=np.ones(4, np.float32)))


def test_a_kind_that_cannot_be_read_is_named(made: Made, tmp_path: Path) -> None:
    checkpoint = made("llama")
    path = tmp_path / "codes.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tests.cpu.models.gguf_writing._write_tensor",
            lambda writer, name, values, kind: writer.add_tensor(
                name, values.astype(np.int8) if "ffn_up" in name else values.astype(np.float32)
            ),
        )
        write_gguf(checkpoint, path)
    said = refusal(path)
    assert "ffn_up" in said
    assert "I8" in said


def test_fewer_experts_than_promised(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "few.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gguf.GGUFWriter,
            "add_expert_count",
            lambda self, count: self.add_uint32("llama.expert_count", count + 2),
        )
        write_gguf(made("mixtral"), path)
    refusal(path)


@pytest.mark.parametrize("cut", ["w3", "w2"])
def test_one_stack_of_fewer_experts(
    cut: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the router has as many as promised."""
    stacked = gguf_writing._stacked

    def fewer(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        whole = stacked(tensors)
        return {n: v[:-1] if n.endswith(f"experts.{cut}.weight") else v for n, v in whole.items()}

    monkeypatch.setattr(gguf_writing, "_stacked", fewer)
    assert "3 matrices, not of 4" in refusal(write_gguf(made("mixtral"), tmp_path / "few.gguf"))


def test_names_are_made_once(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack has one for each expert: made for each of them it would be very many."""
    name, asked = GGUFCheckpoint._name, []

    def counted(checkpoint: GGUFCheckpoint, entry: gguf.ReaderTensor) -> list[str]:
        asked.append(entry.name)
        return name(checkpoint, entry)

    monkeypatch.setattr(GGUFCheckpoint, "_name", counted)
    load_tiny(write_gguf(made("mixtral"), tmp_path / "counted.gguf"))
    assert len(asked) == len(set(asked)) > 0


def test_a_file_cut_short_is_refused_wherever_it_is_cut(made: Made, tmp_path: Path) -> None:
    whole = write_gguf(made("llama"), tmp_path / "whole.gguf").read_bytes()
    cuts = [*range(0, 1200, 97), *range(1200, len(whole), len(whole) // 12), len(whole) - 1]
    for length in cuts:
        path = tmp_path / f"cut{length}.gguf"
        path.write_bytes(whole[:length])
        assert refusal(path) == f"{path} is no whole GGUF file of version 2 or 3; fetch it again"


def test_something_else_called_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("this is no GGUF file, but it is long enough to look at " * 20)
    refusal(path)
