"""`move_pages` and `hash_pages` in Triton: a program for each page of each layer.

Shapes: L layers, P and Q pages of either memory, R bytes of a record, J pages that move.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_HASH, _MOVE = (2048, 4), (8192, 8)
"""Words under way in each program, and its warps: the fastest of five sizes and three numbers on an
H200, for pages of 64 KiB."""


# Not made for one page or multiples of 16: what a model needs is compiled before it serves.
@triton.jit(do_not_specialize=["jobs", "target_pages", "source_pages"])
def _move_kernel(
    target_ptr,
    to_ptr,
    source_ptr,
    from_ptr,
    hash_ptr,
    jobs,
    target_pages,
    source_pages,
    WORDS: tl.constexpr,
    MOVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`target_pages` and `source_pages` are those from one layer to the next, of `WORDS` each."""
    job, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source = source_ptr + (layer * source_pages + tl.load(from_ptr + job)) * WORDS
    if MOVE:
        target = target_ptr + (layer * target_pages + tl.load(to_ptr + job)) * WORDS
    plain = tl.zeros((BLOCK,), tl.int32)
    weighed = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, WORDS, BLOCK):
        place = first + tl.arange(0, BLOCK)
        within = place < WORDS
        word = tl.load(source + place, mask=within, other=0)
        if MOVE:
            tl.store(target + place, word, mask=within)
        plain += word
        weighed += word * (2 * place + 1)
    out = hash_ptr + (layer * jobs + job) * 2
    # In 64 bits, for the interpreter's sums do not wrap.
    tl.store(out, tl.sum(plain.to(tl.int64)).to(tl.int32))
    tl.store(out + 1, tl.sum(weighed.to(tl.int64)).to(tl.int32))


def launch_move(
    target_LPR: Tensor | None, to_J: Tensor | None, source_LQR: Tensor, from_J: Tensor
) -> Tensor:
    """`move_pages` on checked arguments; without a target, `hash_pages`."""
    layers, jobs = source_LQR.shape[0], from_J.numel()
    source = source_LQR.view(torch.int32)
    moves = target_LPR is not None
    target = target_LPR.view(torch.int32) if moves else source
    hashes_LJ2 = torch.empty((layers, jobs, 2), dtype=torch.int32, device=target.device)
    block, warps = _MOVE if moves else _HASH
    words = source.shape[2]
    if jobs:
        _move_kernel[(jobs, layers)](
            target,
            to_J if moves else from_J,
            source,
            from_J,
            hashes_LJ2,
            jobs,
            target.stride(0) // words,
            source.stride(0) // words,
            WORDS=words,
            MOVE=moves,
            BLOCK=min(block, triton.next_power_of_2(words)),
            num_warps=warps,
        )
    return hashes_LJ2
