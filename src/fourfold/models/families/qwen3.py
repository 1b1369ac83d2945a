"""Qwen3 dense: Llama with RMSNorm on every query and key head."""

from __future__ import annotations

from fourfold.models.config import ConfigReader, ModelConfig, read_common
from fourfold.models.families.family import Family, place_mlp


def read_config(reader: ConfigReader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    common = read_common(reader)
    return ModelConfig(family="qwen3", qkv_bias=bias, output_bias=bias, qk_norm="head", **common)


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=read_config,
    place=place_mlp,
)
