"""A model family: how its checkpoints describe it and what they call its tensors.

Every family is computed by the one `Decoder`; a family file only reads the configuration and says
where each tensor of a checkpoint belongs. The placements are the complete list of what a
checkpoint must hold, so missing, extra and misshapen tensors are found by comparing two sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fourfold.models.config import ConfigReader, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one checkpoint tensor goes: rows `start : start + shape[0]` of a parameter.

    `parameter` is the name in our `Decoder`; `expert` indexes its leading axis where the
    parameter stacks experts. `shape` is the tensor's shape in the checkpoint.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    expert: int | None = None


Placements = dict[str, Placement]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model family. `model_type` is config.json's; `read_config` honours all of its fields."""

    model_type: str
    architecture: str
    read_config: Callable[[ConfigReader], ModelConfig]
    place: Callable[[ModelConfig], Placements]


def place_backbone(config: ModelConfig) -> Placements:
    """Embedding, attention, norms and head, which all families name as Llama does."""
    width, head = config.width, config.head_width
    queries, keys = config.query_heads * head, config.kv_heads * head
    table = (config.vocabulary, width)
    placements = {
        "model.embed_tokens.weight": Placement(parameter="embedding.weight", shape=table),
        "model.norm.weight": Placement(parameter="norm.weight", shape=(width,)),
    }
    if not config.tied_embeddings:
        placements["lm_head.weight"] = Placement(parameter="head.weight", shape=table)
    for layer in range(config.layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        attention = f"{theirs}.self_attn"
        for norm, name in (("input_layernorm", "attention_norm"), (_FFN_NORM, "ffn_norm")):
            placements[f"{theirs}.{norm}.weight"] = Placement(
                parameter=f"{ours}.{name}.weight", shape=(width,)
            )
        row = 0
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            qkv = f"{ours}.attention.qkv"
            placements[f"{attention}.{name}.weight"] = Placement(
                parameter=f"{qkv}.weight", shape=(rows, width), start=row
            )
            if config.qkv_bias:
                placements[f"{attention}.{name}.bias"] = Placement(
                    parameter=f"{qkv}.bias", shape=(rows,), start=row
                )
            row += rows
        placements[f"{attention}.o_proj.weight"] = Placement(
            parameter=f"{ours}.attention.output.weight", shape=(width, queries)
        )
        if config.output_bias:
            placements[f"{attention}.o_proj.bias"] = Placement(
                parameter=f"{ours}.attention.output.bias", shape=(width,)
            )
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            for name, rows in (("q", queries), ("k", keys)):
                placements[f"{attention}.{name}_norm.weight"] = Placement(
                    parameter=f"{ours}.attention.{name}_norm.weight",
                    shape=(head if per_head else rows,),
                )
    return placements


_FFN_NORM = "post_attention_layernorm"


def place_dense_ffn(config: ModelConfig, layer: int) -> Placements:
    """A gated dense FFN under `mlp`, as in Llama."""
    theirs, ours = f"model.layers.{layer}.mlp", f"layers.{layer}.ffn"
    up = (config.ffn_width, config.width)
    return {
        f"{theirs}.gate_proj.weight": Placement(parameter=f"{ours}.gate_up.weight", shape=up),
        f"{theirs}.up_proj.weight": Placement(
            parameter=f"{ours}.gate_up.weight", shape=up, start=config.ffn_width
        ),
        f"{theirs}.down_proj.weight": Placement(
            parameter=f"{ours}.down.weight", shape=(config.width, config.ffn_width)
        ),
    }


def place_sparse_ffn(
    config: ModelConfig,
    layer: int,
    *,
    block: str = "mlp",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> Placements:
    """A router and its experts, one tensor each per expert, under the family's names."""
    moe = config.moe
    assert moe is not None
    theirs, ours = f"model.layers.{layer}.{block}", f"layers.{layer}.ffn"
    placements = {
        f"{theirs}.gate.weight": Placement(
            parameter=f"{ours}.router.weight", shape=(moe.experts, config.width)
        )
    }
    wide, narrow = (moe.expert_width, config.width), (config.width, moe.expert_width)
    for expert in range(moe.experts):
        names = f"{theirs}.experts.{expert}"
        placements[f"{names}.{gate}.weight"] = Placement(
            parameter=f"{ours}.experts.gate_up", shape=wide, expert=expert
        )
        placements[f"{names}.{up}.weight"] = Placement(
            parameter=f"{ours}.experts.gate_up", shape=wide, start=moe.expert_width, expert=expert
        )
        placements[f"{names}.{down}.weight"] = Placement(
            parameter=f"{ours}.experts.down", shape=narrow, expert=expert
        )
    return placements


def place_mlp(config: ModelConfig) -> Placements:
    """The backbone with FFNs named as Llama and Qwen name them, dense or sparse by layer."""
    placements = place_backbone(config)
    for layer in range(config.layers):
        place = place_sparse_ffn if config.is_sparse(layer) else place_dense_ffn
        placements.update(place(config, layer))
    return placements
