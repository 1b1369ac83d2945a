"""Decode attention over INT8 pages: mixed lengths, batches, several rows, siblings.

The work is the bytes of the KV pages that have to be read, shared pages once. Where all sequences
have one length, PyTorch's attention over contiguous 16-bit keys and values is the baseline; that of
siblings is as many sequences of the same lengths that share nothing. Baselines count as the same
work, whatever they read, so that ratios are those of times. That of a plan is the fastest of all
plans there are, found by timing them; both with the merge on the way to 8-bit rows, as steps are
served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from fourfold.bench.calibrate.decode_steps import RandomStep, StepOf
from fourfold.bench.kernels.case import Case
from fourfold.kernels.decode_attention import (
    DecodeShape,
    candidate_plans,
    paged_int8_attention_decode_reference,
    plan_decode,
)
from fourfold.kernels.pages import PAGE_TOKENS
from fourfold.kernels.rows import Rows
from fourfold.quadrants.costs import cost_of

_SEQUENCES = 64
_COPY_MARK, _PLAN_MARK, _SIBLINGS_MARK = 0.80, 0.95, 5.0
"""Shares of a copy, of the fastest plan, and of as many sequences that share nothing."""


def cases(device: torch.device) -> Iterator[Case]:
    """Every case, one after another."""
    lengths = np.random.default_rng(1).uniform(np.log(128), np.log(32768), _SEQUENCES)
    # Somewhere within a page, so that the rows of a sequence lie in one.
    mixed = tuple((np.exp(lengths).astype(int) // PAGE_TOKENS * PAGE_TOKENS + 40).tolist())
    for rows in (1, 2, 8):
        case = _case(
            f"int8 64 x 128..32k, {rows} rows", StepOf(lengths=mixed, shape=_of(rows)), device
        )
        yield dataclasses.replace(case, mark=_COPY_MARK if rows == 1 else None)
    for batch in (1, 64, 256):
        for context in (512, 4096):
            step = StepOf(lengths=(context,) * batch, shape=_of(1))
            yield _case(f"int8 {batch} x {context}", step, device)
    for width, shared in ((64, 4), (128, 1)):
        shape = DecodeShape(heads=32, kv_heads=32 // shared, head_width=width)
        step = StepOf(lengths=(2048,) * _SEQUENCES, shape=shape)
        yield _case(f"int8 64 x 2048, width {width}, GQA {shared}", step, device)
    for prefix, groups in ((512, 1), (8192, 1), (8192, 8)):
        step = _siblings(prefix, groups)
        apart = _run(dataclasses.replace(step, siblings=1, shared_pages=0), device)
        case = _case(f"int8 {groups} x 8 siblings over {prefix}", step, device)
        mark = _SIBLINGS_MARK if prefix == 8192 else None
        yield dataclasses.replace(case, baseline=apart, baseline_name="sharing nothing", mark=mark)
    for name, step in (
        ("64 x 128..32k", StepOf(lengths=mixed, shape=_of(1))),
        ("1 x 4096", StepOf(lengths=(4096,), shape=_of(1))),
        ("1 x 16384", StepOf(lengths=(16384,), shape=_of(1))),
        ("8 siblings over 8192", _siblings(8192, 1)),
        ("64 siblings of 8 over 512", _siblings(512, 8)),
    ):
        yield _planned(f"int8 {name}, plan", step, device)
    for batch in (1, 256):
        step = StepOf(lengths=(512,) * batch, shape=_of(1))
        yield _coded(f"int8 {batch} x 512, to 8-bit rows", step, device)


def _siblings(prefix: int, groups: int) -> StepOf:
    return StepOf(
        lengths=tuple(prefix + 64 + 8 * i for i in range(8)) * groups,
        shape=_of(1),
        siblings=8,
        shared_pages=prefix // PAGE_TOKENS,
    )


def _of(rows: int) -> DecodeShape:
    return DecodeShape(heads=32, kv_heads=4, head_width=128, rows=rows)


def _case(name: str, step: StepOf, device: torch.device) -> Case:
    made = RandomStep(step, device, layers=1)
    buffers = made.buffers(plan_decode(made.sequences, made.shape, cost_of(device)))

    def run() -> torch.Tensor:
        return made.attend(0, buffers)

    def error() -> float:
        wanted = paged_int8_attention_decode_reference(*made.arguments(0), made.sequences).float()
        return float((run().float() - wanted).norm() / wanted.norm())

    same = len(set(step.lengths)) == 1
    return Case(
        kernel="paged_int8_attention_decode",
        case=name,
        run=run,
        work=float(step.page_bytes),
        unit="B",
        ceiling="copy bandwidth",
        error=error,
        baseline=_sdpa(step, made.q[0]) if same else None,
        baseline_name="PyTorch SDPA, bfloat16" if same else None,
    )


def _run(step: StepOf, device: torch.device) -> Callable[[], object]:
    """A step by the plan that is chosen for it."""
    made = RandomStep(step, device, layers=1)
    plan = plan_decode(made.sequences, made.shape, cost_of(device))
    return partial(made.attend, 0, made.buffers(plan))


def _planned(name: str, step: StepOf, device: torch.device) -> Case:
    """The plan that the cost model chooses, beside the fastest."""
    timed = RandomStep(step, device)
    plans = candidate_plans(timed.sequences, timed.shape, cost_of(device))
    fast = sorted(plans, key=timed.seconds)
    fastest = min(fast[:3], key=timed.seconds)  # once may have been luck
    made = RandomStep(step, device, layers=1)
    return dataclasses.replace(
        _coded(name, step, device),
        baseline=partial(made.code, 0, made.buffers(fastest)),
        baseline_name="fastest plan",
        mark=_PLAN_MARK,
    )


def _coded(name: str, step: StepOf, device: torch.device) -> Case:
    """With the merge on the way to the 8-bit rows that the output projection reads."""
    made = RandomStep(step, device, layers=1)
    buffers = made.buffers(plan_decode(made.sequences, made.shape, cost_of(device)))

    def run() -> Rows:
        return made.code(0, buffers)

    def error() -> float:
        wanted = paged_int8_attention_decode_reference(*made.arguments(0), made.sequences)
        codes_TW, scale_T = run()
        out = codes_TW.float() * scale_T[:, None]
        return float((out - wanted.flatten(1).float()).norm() / wanted.float().norm())

    return Case(
        kernel="paged_int8_attention_decode",
        case=name,
        run=run,
        work=float(step.page_bytes),
        unit="B",
        ceiling="copy bandwidth",
        error=error,
    )


def _sdpa(step: StepOf, q_BHC: torch.Tensor) -> Callable[[], object]:
    """The library's call for sequences of one length and one row each."""
    size = (len(step.lengths), step.shape.kv_heads, step.lengths[0], step.shape.head_width)
    k_BGTC, v_BGTC = (torch.randn(size, dtype=q_BHC.dtype, device=q_BHC.device) for _ in range(2))
    return lambda: F.scaled_dot_product_attention(
        q_BHC[:, :, None], k_BGTC, v_BGTC, enable_gqa=True
    )
