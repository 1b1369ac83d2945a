"""Filling and moving pages, in the shape of Qwen3-30B-A3B.

Shapes: J jobs, S rows, T tokens, G KV heads, N = 64 tokens per page, C head width, A channels of
queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fourfold.bench.kernels.case import Case
from fourfold.kernels.pages import (
    PAGE_TOKENS,
    VALUE_ORDER,
    PageCodes,
    PageLayout,
    move_pages,
    seal_pages,
)
from fourfold.kernels.rope import OpenRows, norm_rope_append
from fourfold.kernels.rope import reference as rope_reference

_HEADS, _KV_HEADS, _HEAD_WIDTH = 32, 4, 128
_LAYERS = 48
_EPS = 1e-6


def cases(device: torch.device) -> Iterator[Case]:
    """A long prefill, one chunk of 16k tokens; what a decode step adds; prompts that move."""
    for codes in PageCodes:
        yield _seal(2048, codes, device)
    for pages in (256, 4):
        yield _seal(pages, PageCodes.INT8, device)
    for rows in (256, 1):
        yield _norm_rope_append(rows, device)
    for tokens in (4096, 512):
        yield _move(tokens, device)


def _keys_and_values(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bfloat16 [rows, G, C], with a channel of the keys eight times as large as the others."""
    shape = (rows, _KV_HEADS, _HEAD_WIDTH)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    k[..., 7] *= 8
    return k, v


def _seal(pages: int, codes: PageCodes, device: torch.device) -> Case:
    layout = PageLayout(kv_heads=_KV_HEADS, head_width=_HEAD_WIDTH, codes=codes)
    k_SGC, v_SGC = _keys_and_values(pages * PAGE_TOKENS, device)
    records = torch.empty(pages, layout.record_bytes, dtype=torch.uint8, device=device)
    first_row_J = torch.arange(pages, dtype=torch.int32, device=device) * PAGE_TOKENS
    page_J = torch.randperm(pages, device=device).int()
    run = partial(seal_pages, records, layout, k_SGC, v_SGC, first_row_J, page_J)

    def error() -> float:
        records.fill_(0x7F)
        run()
        views = layout.views(records[page_J.long()])
        order = torch.tensor(VALUE_ORDER, device=device)
        keys_JGNC = views.keys.float() * views.scales[:, 0, :, None, None]
        values_JGCN = views.values.float() * views.scales[:, 1, :, None, None]
        expected_k, expected_v = (
            torch.unflatten(x, 0, (pages, PAGE_TOKENS)).transpose(1, 2).float()
            for x in (k_SGC, v_SGC)
        )
        of_values = expected_v[:, :, order].transpose(2, 3)
        return max(
            float((out - expected).norm() / expected.norm())
            for out, expected in ((keys_JGNC, expected_k), (values_JGCN, of_values))
        )

    read = k_SGC.nbytes + v_SGC.nbytes
    return Case(
        kernel="seal_pages",
        case=f"{pages} pages, {_KV_HEADS} heads x {_HEAD_WIDTH}, {codes}",
        run=run,
        work=float(read + pages * (layout.code_bytes + 8 * _KV_HEADS)),
        unit="B",
        ceiling="copy bandwidth",
        error=error,
    )


def _move(tokens: int, device: torch.device) -> Case:
    """A prompt of so many tokens from one memory to another."""
    pages = tokens // PAGE_TOKENS
    layout = PageLayout(kv_heads=_KV_HEADS, head_width=_HEAD_WIDTH)
    shape = (_LAYERS, 2 * pages, layout.record_bytes)
    source = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    from_J, to_J = (torch.randperm(2 * pages, device=device)[:pages] for _ in range(2))
    run = partial(move_pages, target, to_J, source, from_J)

    def error() -> float:
        target.zero_()
        run()
        return float((target[:, to_J] != source[:, from_J]).float().mean())

    return Case(
        kernel="move_pages",
        case=f"{tokens} tokens, {_LAYERS} layers, int8",
        run=run,
        work=2.0 * _LAYERS * pages * layout.record_bytes,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
        baseline=lambda: target.index_copy_(1, to_J, source.index_select(1, from_J)),
        baseline_name="torch index_select, index_copy_",
        baseline_work=2.0 * _LAYERS * pages * layout.record_bytes,
    )


def _norm_rope_append(rows: int, device: torch.device) -> Case:
    """Of a decode step: keys and values go to open pages alone."""
    across = (_HEADS + 2 * _KV_HEADS) * _HEAD_WIDTH
    qkv_TA = torch.randn(rows, across, dtype=torch.bfloat16, device=device)
    cos_TC, sin_TC = torch.randn(2, rows, _HEAD_WIDTH, dtype=torch.bfloat16, device=device)
    q_weight, k_weight = torch.rand(2, _HEAD_WIDTH, device=device) + 0.5
    options = q_weight, k_weight, _EPS
    open_k, open_v = _keys_and_values(rows * PAGE_TOKENS, device)
    place_T = torch.randperm(open_k.shape[0], device=device)[:rows].int()
    heads = _HEADS, _KV_HEADS, _HEAD_WIDTH

    def run() -> Tensor:
        opened = OpenRows(open_k, open_v, place_T)
        return norm_rope_append(qkv_TA, *heads, cos_TC, sin_TC, opened, *options)[0]

    def error() -> float:
        open_k.fill_(float("nan"))
        ours = (run(), open_k[place_T.long()], open_v[place_T.long()])
        exact = rope_reference.norm_rope(qkv_TA.float(), *heads, cos_TC, sin_TC, *options)
        return max(
            float((out.float() - expected).norm() / expected.norm())
            for out, expected in zip(ours, exact, strict=True)
        )

    return Case(
        kernel="norm_rope_append",
        case=f"{rows} rows, {_HEADS}/{_KV_HEADS} heads x {_HEAD_WIDTH}, normed",
        run=run,
        work=4.0 * rows * across + 4.0 * rows * _HEAD_WIDTH,
        unit="B",
        ceiling="copy bandwidth",
        error=error,
    )
