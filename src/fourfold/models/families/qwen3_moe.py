"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen3 with sparse FFNs in most layers."""

from __future__ import annotations

from fourfold.models.config import (
    MOST_EXPERTS,
    MOST_LAYERS,
    MOST_WIDTH,
    ConfigReader,
    ModelConfig,
    MoEConfig,
    read_common,
)
from fourfold.models.families.family import Family, place_mlp


def read_config(reader: ConfigReader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    common = read_common(reader)
    experts = "num_local_experts" if reader.has("num_local_experts") else "num_experts"
    step = reader.integer("decoder_sparse_step", 1, most=MOST_LAYERS)
    dense = set(reader.integers("mlp_only_layers"))
    dense |= {layer for layer in range(common["layers"]) if (layer + 1) % step}
    return ModelConfig(
        family="qwen3_moe",
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        moe=MoEConfig(
            experts=reader.experts(experts, common["layers"]),
            experts_per_token=reader.integer("num_experts_per_tok", most=MOST_EXPERTS),
            expert_width=reader.integer("moe_intermediate_size", most=MOST_WIDTH),
            normalise=reader.flag("norm_topk_prob", False),
        ),
        dense_layers=frozenset(dense),
        **common,
    )


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read_config=read_config,
    place=place_mlp,
)
