"""What one page of keys and values looks like in memory, on the wire and to the kernels.

A sealed page holds 64 tokens of one sequence in one layer: 8-bit keys and values with one float32
scale per KV head for the keys and one for the values. All of it is one record of contiguous bytes,
scales included, so that what lies in memory is what is sent. Within a record:

    keys    [G, N, C]   codes, K-major for q k^T
    values  [G, C, N]   codes, transposed, K-major for p v; tokens in `VALUE_ORDER`
    scales  [2, G]      float32: of the keys, then of the values; value ~ code * scale
    padding             up to a multiple of 128 bytes

The page a sequence is still filling (the open page) stays in 16 bits elsewhere, token after token.

Shapes: P pages, G KV heads, N = 64 tokens per page, C head width.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

import torch
from torch import Tensor

PAGE_TOKENS = 64
_ALIGNMENT = 128
_LEAST_SCALES = 32

# A tensor core hands a thread scores of keys (2t, 2t + 1) and (8 + 2t, 9 + 2t) out of 16, but wants
# four neighbouring 8-bit weights of it in the next product. Storing values in this order makes
# those four neighbours, so that no thread has to send its weights to another.
_OF_SIXTEEN = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
VALUE_ORDER = tuple(16 * block + key for block in range(PAGE_TOKENS // 16) for key in _OF_SIXTEEN)
"""Place i of a page's values holds the token `VALUE_ORDER[i]`."""


class PageCodes(enum.StrEnum):
    """What a sealed page's codes are."""

    INT8 = "int8"
    """-127..127, exact int32 sums: the same on every GPU generation and on a CPU."""
    FP8 = "fp8"
    """float8_e4m3fn, scaled so that the largest is 448."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self is PageCodes.INT8 else torch.float8_e4m3fn

    @property
    def largest(self) -> float:
        return 127.0 if self is PageCodes.INT8 else 448.0


class PageViews(NamedTuple):
    """The parts of page records [..., record]: views, no copies."""

    keys: Tensor
    """[..., G, N, C] in the dtype of the codes."""
    values: Tensor
    """[..., G, C, N] in the dtype of the codes, tokens in `VALUE_ORDER`."""
    scales: Tensor
    """[..., 2, G] float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageLayout:
    """The record of one sealed page of one layer."""

    kv_heads: int
    head_width: int
    codes: PageCodes = PageCodes.INT8

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes, where the scales begin."""
        return 2 * self.kv_heads * PAGE_TOKENS * self.head_width

    @property
    def record_bytes(self) -> int:
        size = self.code_bytes + 2 * self.kv_heads * 4
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def views(self, records: Tensor) -> PageViews:
        """The parts of uint8 records [..., record_bytes]."""
        leading, half = records.shape[:-1], self.code_bytes // 2
        codes = records.view(self.codes.dtype)
        scales = records[..., self.code_bytes : self.code_bytes + 8 * self.kv_heads]
        return PageViews(
            torch.unflatten(codes[..., :half], -1, (self.kv_heads, PAGE_TOKENS, self.head_width)),
            torch.unflatten(
                codes[..., half : 2 * half], -1, (self.kv_heads, self.head_width, PAGE_TOKENS)
            ),
            scales.view(torch.float32).view(*leading, 2, self.kv_heads),
        )


def scales_fetched(kv_heads: int) -> int:
    """Float32s fetched with a page on Hopper, where a fetch starts at 16 bytes: the scales of all
    heads, and padding."""
    return max(_LEAST_SCALES, 1 << (2 * kv_heads - 1).bit_length())
