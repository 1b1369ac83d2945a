"""Every field of a config.json is honoured or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from fourfold.errors import CheckpointError
from fourfold.models.config import ModelConfig, MoEConfig, RopeConfig
from fourfold.models.families.registry import FAMILIES
from fourfold.models.loading import read_model_config
from tests.cpu.models import hub_configs

COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "partial_rotary_factor": 1.0,
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def minimal(family: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": family, **COMMON, **OWN[family], **fields}


def read(fields: dict[str, Any]) -> ModelConfig:
    _, config = read_model_config(fields, "here/config.json")
    return config


def hub(text: str) -> ModelConfig:
    return read(json.loads(text))


def test_every_family_is_tried() -> None:
    assert set(OWN) == set(FAMILIES)


@pytest.mark.parametrize("family", OWN)
def test_what_is_needed_is_enough(family: str) -> None:
    config = read(minimal(family))
    assert config.family == family
    assert (config.moe is None) == (family in ("llama", "qwen3"))


@pytest.mark.parametrize("family", OWN)
def test_an_unknown_field_is_refused_by_name(family: str) -> None:
    with pytest.raises(CheckpointError, match=r"here/config\.json.*attention_sinks = 4"):
        read(minimal(family, attention_sinks=4))


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 4096),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"] * 2),
        ("hidden_act", "gelu"),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("mlp_bias", True),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}),
        ("rope_scaling", {**LLAMA3, "attention_factor": 2.0}),
        ("rope_interleaved", True),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_what_we_would_not_compute_is_refused(family: str, name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"here/config\.json") as caught:
        read(minimal(family, **{name: value}))
    said = str(caught.value)
    assert name in said or "rope" in said
    assert "\n" not in said


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", None),
        ("use_sliding_window", False),
        ("layer_types", ["full_attention"] * 4),
        ("hidden_act", "silu"),
        ("quantization_config", None),
        ("rope_scaling", {"rope_type": "default"}),
        ("rope_interleaved", False),
        ("torch_dtype", "bfloat16"),
        ("architectures", ["Anything"]),
    ],
)
def test_saying_the_usual_aloud_is_no_reason_to_refuse(family: str, name: str, value: Any) -> None:
    assert read(minimal(family, **{name: value})) == read(minimal(family))


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("name", sorted(set(COMMON) - {"num_key_value_heads"}))
def test_a_missing_field_is_named(family: str, name: str) -> None:
    fields = minimal(family)
    del fields[name]
    with pytest.raises(CheckpointError, match=name):
        read(fields)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "glm4_moe"])
def test_a_missing_field_of_the_family_is_named(family: str) -> None:
    for name in OWN[family]:
        fields = minimal(family)
        del fields[name]
        with pytest.raises(CheckpointError, match=name):
            read(fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("num_hidden_layers", [4]),
        ("rms_norm_eps", "small"),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("rope_theta", "10000"),
        ("num_key_value_heads", 3),
        ("head_dim", 31),
        ("eos_token_id", "two"),
        ("eos_token_id", [2, "three"]),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("layer_types", "full_attention"),
        ("layer_types", True),
        ("layer_types", [["full_attention"]]),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", 0),
        ("rope_theta", float("inf")),
        ("rope_scaling", {**LLAMA3, "factor": 0}),
        ("rope_scaling", {**LLAMA3, "low_freq_factor": 4.0}),
        ("rope_scaling", {**LLAMA3, "original_max_position_embeddings": float("nan")}),
        ("rope_scaling", "yarn"),
        ("rope_scaling", {"rope_type": "linear", "factor": "4"}),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(minimal("llama", **{name: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 9),
        ("num_experts", -8),
        ("decoder_sparse_step", 0),
        ("mlp_only_layers", 2),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError):
        read(minimal("qwen3_moe", **{name: value}))


ABSURD = [
    ("llama", "num_hidden_layers", 1024),
    ("llama", "vocab_size", 16_777_216),
    ("llama", "hidden_size", 1_048_576),
    ("llama", "intermediate_size", 1_048_576),
    ("llama", "num_attention_heads", 4096),
    ("llama", "num_key_value_heads", 4096),
    ("llama", "max_position_embeddings", 1_073_741_824),
    ("llama", "eos_token_id", 2_147_483_647),
    ("qwen3", "head_dim", 4096),
    ("qwen3_moe", "num_experts", 8192),
    ("qwen3_moe", "moe_intermediate_size", 1_048_576),
    ("qwen3_moe", "num_experts_per_tok", 8192),
    ("qwen3_moe", "decoder_sparse_step", 1024),
    ("mixtral", "num_local_experts", 8192),
    ("olmoe", "num_experts", 8192),
    ("glm4_moe", "n_routed_experts", 8192),
    ("glm4_moe", "n_shared_experts", 8192),
    ("glm4_moe", "first_k_dense_replace", 1024),
    ("glm4_moe", "moe_intermediate_size", 1_048_576),
]


@pytest.mark.parametrize(("family", "name", "most"), ABSURD)
@pytest.mark.parametrize("factor", [1, 10**9, 10**4000])
def test_a_size_beyond_all_reason_is_refused_with_its_bound(
    family: str, name: str, most: int, factor: int
) -> None:
    value = most + 1 if factor == 1 else most * factor
    with pytest.raises(CheckpointError) as caught:
        read(minimal(family, **{name: value}))
    shown = str(value) if factor < 10**4000 else f"{str(value)[:20]}... ({len(str(value))} digits)"
    assert str(caught.value) == f"here/config.json: {name} = {shown} is more than {most}"


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "glm4_moe"])
def test_more_experts_in_all_layers_than_any_model_has_are_refused(family: str) -> None:
    name = next(name for name in OWN[family] if "experts" in name)
    assert read(minimal(family, num_hidden_layers=128, **{name: 1024})).layers == 128
    with pytest.raises(CheckpointError, match=f"{name} = 1025 in 128 layers are 131200 experts"):
        read(minimal(family, num_hidden_layers=128, **{name: 1025}))


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
def test_an_integer_that_no_float_holds_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} = 1000.*401 digits"):
        read(minimal("llama", **{name: 10**400}))


@pytest.mark.parametrize("model_type", [None, "gpt2", "Llama", 7, ["llama"]])
def test_an_unknown_family_is_refused_with_those_there_are(model_type: Any) -> None:
    with pytest.raises(CheckpointError, match="mixtral"):
        read({"model_type": model_type, **COMMON})


@pytest.mark.parametrize("family", OWN)
def test_an_absent_theta_is_the_familys_own(family: str) -> None:
    theirs = transformers.AutoConfig.for_model(family).default_theta
    assert read(minimal(family)).rope.theta == theirs


def test_two_thetas_that_differ_are_refused() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(CheckpointError, match="rope_theta"):
        read(minimal("llama", rope_theta=1e4, rope_parameters=parameters))
    assert read(minimal("llama", rope_theta=1e6, rope_parameters=parameters)).rope.theta == 1e6


@pytest.mark.parametrize(
    ("sparse_step", "dense_list", "dense"),
    [
        (1, [], set()),
        (1, [0, 3], {0, 3}),
        (2, [], {0, 2}),
        (2, [1], {0, 1, 2}),
        (9, [], {*range(4)}),
    ],
)
def test_which_layers_of_qwen3_moe_stay_dense(
    sparse_step: int, dense_list: list[int], dense: set[int]
) -> None:
    config = read(minimal("qwen3_moe", decoder_sparse_step=sparse_step, mlp_only_layers=dense_list))
    assert {layer for layer in range(4) if not config.is_sparse(layer)} == dense


def test_llama_31_in_both_spellings() -> None:
    config = hub(hub_configs.LLAMA_31_8B)
    assert config == hub(hub_configs.LLAMA_31_8B_NEW)
    assert config == ModelConfig(
        family="llama",
        vocabulary=128_256,
        layers=32,
        width=4096,
        query_heads=32,
        kv_heads=8,
        head_width=128,
        ffn_width=14_336,
        max_positions=131_072,
        norm_eps=1e-5,
        rope=RopeConfig(
            theta=500_000.0,
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        ),
        eos_token_ids=(128_001, 128_008, 128_009),
    )


def test_llama_2_without_rope_fields() -> None:
    config = hub(hub_configs.LLAMA_2_7B)
    assert config.rope == RopeConfig(theta=10_000.0)
    assert (config.kv_heads, config.eos_token_ids) == (32, (2,))


def test_qwen3_30b_a3b() -> None:
    config = hub(hub_configs.QWEN3_30B_A3B)
    assert config.moe == MoEConfig(
        experts=128, experts_per_token=8, expert_width=768, score="softmax", normalise=True
    )
    assert (config.qk_norm, config.head_width, config.width) == ("head", 128, 2048)
    assert config.rope == RopeConfig(theta=1e6)
    assert all(config.is_sparse(layer) for layer in range(48))
    assert not config.tied_embeddings


def test_qwen3_06b() -> None:
    config = hub(hub_configs.QWEN3_06B)
    assert config.moe is None
    assert (config.qk_norm, config.tied_embeddings, config.head_width) == ("head", True, 128)


def test_mixtral_8x7b() -> None:
    config = hub(hub_configs.MIXTRAL_8X7B)
    assert config.moe == MoEConfig(
        experts=8, experts_per_token=2, expert_width=14_336, score="softmax", normalise=True
    )
    assert (config.qk_norm, config.qkv_bias, config.rope.theta) == ("none", False, 1e6)


def test_olmoe_1b_7b() -> None:
    config = hub(hub_configs.OLMOE_1B_7B)
    assert config.moe == MoEConfig(
        experts=64, experts_per_token=8, expert_width=1024, score="softmax", normalise=False
    )
    assert (config.qk_norm, config.qkv_clip, config.eos_token_ids) == ("all_heads", None, (50_279,))


def test_smollm2_135m() -> None:
    config = hub(hub_configs.SMOLLM2_135M)
    assert (config.layers, config.width, config.query_heads, config.kv_heads) == (30, 576, 9, 3)
    assert (config.tied_embeddings, config.rope.theta) == (True, 100_000.0)
