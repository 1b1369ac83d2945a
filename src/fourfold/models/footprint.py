"""How large a model is: parameters in all and active per token, by the part that computes them."""

from __future__ import annotations

import dataclasses

from fourfold.models.config import ModelConfig

EXPERTS = "experts and routers"
DENSE_FFN = "dense FFN"
TIED = "embedding, also head"


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters of one part of a model; `active` are those that one token passes."""

    name: str
    total: int
    active: int


def footprint(config: ModelConfig) -> list[Part]:
    """The parts of a model: embeddings, attention, FFN (dense, shared and experts), norms."""
    width, layers = config.width, config.layers
    queries = config.query_heads * config.head_width
    keys = config.kv_heads * config.head_width
    attention = width * (2 * queries + 2 * keys)
    attention += (queries + 2 * keys) * config.qkv_bias + width * config.output_bias
    norms = 2 * width
    if config.qk_norm == "head":
        norms += 2 * config.head_width
    elif config.qk_norm == "all_heads":
        norms += queries + keys
    sparse = sum(config.is_sparse(layer) for layer in range(layers))
    parts = [Part("attention", attention * layers, attention * layers)]
    if layers > sparse:
        dense = 3 * width * config.ffn_width * (layers - sparse)
        parts.append(Part(DENSE_FFN, dense, dense))
    if config.moe is not None and sparse:
        moe = config.moe
        expert = 3 * width * moe.expert_width
        always = (width + moe.selection_bias) * moe.experts + 3 * width * moe.shared_width
        parts.append(
            Part(
                EXPERTS,
                sparse * (moe.experts * expert + always),
                sparse * (moe.experts_per_token * expert + always),
            )
        )
    table = config.vocabulary * width
    if config.tied_embeddings:
        parts.append(Part(TIED, table, table))
    else:
        parts.append(Part("embedding", table, 0))
        parts.append(Part("head", table, table))
    parts.append(Part("norms", norms * layers + width, norms * layers + width))
    return parts
