"""Llama and what copies its form: Llama 2 and 3, SmolLM2."""

from __future__ import annotations

from fourfold.models.config import ConfigReader, ModelConfig, read_common
from fourfold.models.families.family import Family, place_mlp


def read_config(reader: ConfigReader) -> ModelConfig:
    bias = reader.flag("attention_bias", False)
    return ModelConfig(family="llama", qkv_bias=bias, output_bias=bias, **read_common(reader))


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=read_config,
    place=place_mlp,
)
