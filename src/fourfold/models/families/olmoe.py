"""OLMoE (1B-7B): many small experts, RMSNorm over all query heads and over all key heads."""

from __future__ import annotations

from fourfold.models.config import MOST_EXPERTS, ConfigReader, ModelConfig, MoEConfig, read_common
from fourfold.models.families.family import Family, place_mlp


def read_config(reader: ConfigReader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    common = read_common(reader)
    clip = None if reader.optional("clip_qkv") is None else reader.number("clip_qkv")
    return ModelConfig(
        family="olmoe",
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="all_heads",
        qkv_clip=clip,
        moe=MoEConfig(
            experts=reader.experts("num_experts", common["layers"]),
            experts_per_token=reader.integer("num_experts_per_tok", most=MOST_EXPERTS),
            expert_width=common["ffn_width"],
            normalise=reader.flag("norm_topk_prob", False),
        ),
        **common,
    )


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read_config=read_config,
    place=place_mlp,
)
