"""Attention of decoding sequences over 8-bit pages, by a plan made once per step."""

from fourfold.kernels.decode_attention.attend import (
    merge_and_quantize,
    paged_int8_attention_decode,
    paged_int8_attention_decode_unmerged,
)
from fourfold.kernels.decode_attention.buffers import PlanBuffers, PlanCapacity, empty_partials
from fourfold.kernels.decode_attention.cost import DecodeCost
from fourfold.kernels.decode_attention.plan import (
    DecodePlan,
    DecodeSequences,
    DecodeShape,
)
from fourfold.kernels.decode_attention.planner import DecodePlanner
from fourfold.kernels.decode_attention.reference import paged_int8_attention_decode_reference
from fourfold.kernels.decode_attention.search import candidate_plans, plan_decode

__all__ = [
    "DecodeCost",
    "DecodePlan",
    "DecodePlanner",
    "DecodeSequences",
    "DecodeShape",
    "PlanBuffers",
    "PlanCapacity",
    "candidate_plans",
    "empty_partials",
    "merge_and_quantize",
    "paged_int8_attention_decode",
    "paged_int8_attention_decode_reference",
    "paged_int8_attention_decode_unmerged",
    "plan_decode",
]
