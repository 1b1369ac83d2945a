"""GLM-4-MoE (GLM-4.5 and 4.6): a sigmoid router with a selection bias, shared experts beside the
chosen ones, the first layers dense.

Only checkpoints that rotate whole heads are computed, as training writes them: the published ones
rotate half of each and are refused by that field.
"""

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
from fourfold.models.families.family import (
    Family,
    Placement,
    Placements,
    place_backbone,
    place_dense_ffn,
    place_sparse_ffn,
)


def read_config(reader: ConfigReader) -> ModelConfig:
    common = read_common(reader)
    # Of what is absent the family's default is meant, and half of the head is rotated.
    if not reader.has("partial_rotary_factor") and not _names_rotary_factor(reader):
        raise reader.error("partial_rotary_factor = 0.5 (the default) is not supported (only 1.0)")
    for groups in ("n_group", "topk_group"):
        reader.expect(groups, 1)
    reader.optional("num_nextn_predict_layers")  # their tensors would be left over, and named
    first_dense = reader.integer("first_k_dense_replace", 1, least=0, most=MOST_LAYERS)
    shared = reader.integer("n_shared_experts", 1, most=MOST_EXPERTS)
    expert_width = reader.integer("moe_intermediate_size", most=MOST_WIDTH)
    return ModelConfig(
        family="glm4_moe",
        qkv_bias=reader.flag("attention_bias", False),
        qk_norm="head" if reader.flag("use_qk_norm", False) else "none",
        moe=MoEConfig(
            experts=reader.experts("n_routed_experts", common["layers"]),
            experts_per_token=reader.integer("num_experts_per_tok", most=MOST_EXPERTS),
            expert_width=expert_width,
            score="sigmoid",
            normalise=reader.flag("norm_topk_prob", True),
            selection_bias=True,
            scale=reader.number("routed_scaling_factor", 1.0),
            shared_width=shared * expert_width,
        ),
        dense_layers=frozenset(range(first_dense)),
        **common,
    )


def _names_rotary_factor(reader: ConfigReader) -> bool:
    return "partial_rotary_factor" in (reader.optional("rope_parameters") or {})


def place(config: ModelConfig) -> Placements:
    placements = place_backbone(config)
    for layer in range(config.layers):
        if config.is_sparse(layer):
            placements |= place_sparse_ffn(config, layer) | _place_own(config, layer)
        else:
            placements |= place_dense_ffn(config, layer)
    return placements


def _place_own(config: ModelConfig, layer: int) -> Placements:
    """What a sparse layer of this family has besides: the selection bias, the shared experts."""
    moe = config.moe
    assert moe is not None
    theirs, ours = f"model.layers.{layer}.mlp", f"layers.{layer}.ffn"
    shared, up = f"{theirs}.shared_experts", (moe.shared_width, config.width)
    into = f"{ours}.shared.gate_up.weight"
    return {
        f"{theirs}.gate.e_score_correction_bias": Placement(
            parameter=f"{ours}.router.selection_bias", shape=(moe.experts,)
        ),
        f"{shared}.gate_proj.weight": Placement(parameter=into, shape=up),
        f"{shared}.up_proj.weight": Placement(parameter=into, shape=up, start=moe.shared_width),
        f"{shared}.down_proj.weight": Placement(
            parameter=f"{ours}.shared.down.weight", shape=(config.width, moe.shared_width)
        ),
    }


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    read_config=read_config,
    place=place,
)
