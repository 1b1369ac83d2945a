"""Attention of decoding sequences over 8-bit pages, by a plan made once per step."""

from fourfold.kernels.decode_attention.attend import paged_int8_attention_decode
from fourfold.kernels.decode_attention.buffers import PlanBuffers, PlanCapacity
from fourfold.kernels.decode_attention.cost import DecodeCost
from fourfold.kernels.decode_attention.plan import (
    DecodePlan,
    DecodeSequences,
    DecodeShape,
    candidate_plans,
    plan_decode,
)
from fourfold.kernels.decode_attention.reference import paged_int8_attention_decode_reference

__all__ = [
    "DecodeCost",
    "DecodePlan",
    "DecodeSequences",
    "DecodeShape",
    "PlanBuffers",
    "PlanCapacity",
    "candidate_plans",
    "paged_int8_attention_decode",
    "paged_int8_attention_decode_reference",
    "plan_decode",
]
