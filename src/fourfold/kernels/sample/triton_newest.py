"""`newest_tokens` in Triton: a program for 128 rows.

Shapes: T rows, N slots.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 128  # of a program


@triton.jit(do_not_specialize=["T"])
def _newest(tokens, sources, last, out, T, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(sources + row, row < T, other=-1)
    drawn = tl.load(last + source, source >= 0, other=0)
    token = tl.load(tokens + row, row < T, other=0).to(tl.int64)
    tl.store(out + row, tl.where(source >= 0, drawn, token), row < T)


def launch(tokens_T: Tensor, sources_T: Tensor, last_N: Tensor) -> Tensor:
    """`newest_tokens` on checked arguments."""
    rows = len(tokens_T)
    out_T = torch.empty(rows, dtype=torch.int64, device=tokens_T.device)
    grid = (triton.cdiv(rows, _ROWS),)
    _newest[grid](tokens_T, sources_T, last_N, out_T, rows, ROWS=_ROWS, num_warps=4)
    return out_T
