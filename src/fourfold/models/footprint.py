"""How large a model is: parameters in all and active per token, by the part that computes them."""

from __future__ import annotations

import dataclasses

from fourfold.models.config import ModelConfig
from fourfold.models.precision import Precision

EXPERTS = "experts and routers"
DENSE_FFN = "dense FFN"
TIED = "embedding, also head"
# Bytes of a 4-bit weight with its share of its group's parameters (`quantising.RECIPES`).
_PACKED = {Precision.W4A8: 0.5 + 2 / 64, Precision.W4A8_FP8: 0.5 + 1 / 128}


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


def bytes_per_parameter(part: str, precision: Precision, *, on_gpu: bool) -> float:
    """Bytes one parameter of a part takes; tables that are looked up and norms stay unquantised."""
    looked_up = 2 if on_gpu else 4
    if not precision.quantised:
        return 2 if precision is Precision.BFLOAT16 else 4
    if part == TIED:
        return looked_up + 1  # multiplied in int8
    if part in ("embedding", "norms"):
        return looked_up
    # On a CPU 4-bit codes are expanded to the int8 codes that they stand for.
    packed = on_gpu and part in (EXPERTS, DENSE_FFN)
    return _PACKED.get(precision, 1) if packed else 1
