"""Attention of chunks of prompts over 8-bit pages and over themselves."""

from fourfold.kernels.prefill_attention.attention import paged_int8_attention_prefill
from fourfold.kernels.prefill_attention.batch import (
    PrefillBatch,
    PrefillChunk,
    PrefillRoom,
    describe_prefill,
)

__all__ = [
    "PrefillBatch",
    "PrefillChunk",
    "PrefillRoom",
    "describe_prefill",
    "paged_int8_attention_prefill",
]
