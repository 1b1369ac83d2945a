"""Mixtral (8x7B, 8x22B): Llama with every FFN sparse, under names of its own."""

from __future__ import annotations

from fourfold.models.config import MOST_EXPERTS, ConfigReader, ModelConfig, MoEConfig, read_common
from fourfold.models.families.family import Family, Placements, place_backbone, place_sparse_ffn


def read_config(reader: ConfigReader) -> ModelConfig:
    common = read_common(reader, theta_default=1e6)
    reader.expect("sliding_window")  # Mixtral knows no use_sliding_window that turns it off
    return ModelConfig(
        family="mixtral",
        moe=MoEConfig(
            experts=reader.experts("num_local_experts", common["layers"]),
            experts_per_token=reader.integer("num_experts_per_tok", most=MOST_EXPERTS),
            expert_width=common["ffn_width"],
        ),
        **common,
    )


def place(config: ModelConfig) -> Placements:
    placements = place_backbone(config)
    for layer in range(config.layers):
        placements |= place_sparse_ffn(
            config, layer, block="block_sparse_moe", gate="w1", up="w3", down="w2"
        )
    return placements


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read_config=read_config,
    place=place,
)
