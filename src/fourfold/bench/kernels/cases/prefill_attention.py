"""Prefill attention over 8-bit pages, against 16-bit attention of the same shape.

Shapes: T rows, H query heads, G KV heads, C head width, K tokens of one sequence, R chosen rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fourfold.bench.kernels.case import Case
from fourfold.kernels.pages.layout import PAGE_TOKENS, VALUE_ORDER, PageCodes, PageLayout
from fourfold.kernels.pages.reference import seal_pages
from fourfold.kernels.prefill_attention import (
    PrefillBatch,
    describe_prefill,
    paged_int8_attention_prefill,
)

_SAMPLED_ROWS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillInputs:
    """A step of prompt chunks with random queries, keys and values."""

    q_THC: Tensor
    k_TGC: Tensor
    v_TGC: Tensor
    records: Tensor
    layout: PageLayout
    batch: PrefillBatch

    def attend(self) -> Tensor:
        """One call of the verb."""
        return paged_int8_attention_prefill(
            self.q_THC, self.k_TGC, self.v_TGC, self.records, self.layout, self.batch
        )

    def exact(self, chunk: int, rows_R: Tensor) -> Tensor:
        """Float64 attention [R, H, C] of some of a chunk's rows, codes taken as what they stand
        for."""
        described = self.batch.chunks[chunk]
        pages = list(described.page_ids[: described.pages_read])
        k_KGC, v_KGC = dequantized(self.records[pages], self.layout)
        span = slice(described.first_row, described.first_row + described.rows)
        q_RHC = self.q_THC[span][rows_R].double()
        out = []
        for row, q_HC in zip(rows_R.tolist(), q_RHC, strict=True):
            own = row // PAGE_TOKENS * PAGE_TOKENS
            before = described.prefix_tokens + own
            fresh = slice(described.first_row + own, described.first_row + row + 1)
            k = torch.cat((k_KGC[:before], self.k_TGC[fresh].double()))
            v = torch.cat((v_KGC[:before], self.v_TGC[fresh].double()))
            q_GJC = q_HC.unflatten(0, (self.layout.kv_heads, -1))
            weights = torch.einsum("gjc,kgc->gjk", q_GJC, k) * self.layout.head_width**-0.5
            out.append(torch.einsum("gjk,kgc->gjc", weights.softmax(-1), v).flatten(0, 1))
        return torch.stack(out)

    def error(self) -> float:
        """||out - exact|| / ||exact|| over rows spread over every chunk."""
        out_THC = self.attend()
        missed = norm = 0.0
        for i, chunk in enumerate(self.batch.chunks):
            rows_R = torch.linspace(
                0, chunk.rows - 1, min(chunk.rows, _SAMPLED_ROWS), device=out_THC.device
            ).long()
            wanted = self.exact(i, rows_R)
            missed += float((out_THC[chunk.first_row + rows_R] - wanted).square().sum())
            norm += float(wanted.square().sum())
        return float((missed / norm) ** 0.5)


def dequantized(records: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Keys and values [K, G, C] of consecutive pages, float64."""
    views = layout.views(records)
    k_scale, v_scale = views.scales.double().unbind(1)
    keys = views.keys.double() * k_scale[..., None, None]
    values = torch.empty_like(keys)
    values[:, :, list(VALUE_ORDER)] = (views.values.double() * v_scale[..., None, None]).mT
    return keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)


def make_inputs(
    chunks: Sequence[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    width: int,
    codes: PageCodes = PageCodes.INT8,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device,
    seed: int = 0,
    biased: float = 0.0,
    sink: float = 0.0,
) -> PrefillInputs:
    """Chunks as (rows, prefix tokens), one after another, each of its own sequence. Some keys and
    values are outliers; `biased` is added to two channels of every key, and `sink` times a common
    direction of all queries to the first key of every sequence."""
    generator = torch.Generator(device).manual_seed(seed)
    layout = PageLayout(kv_heads=kv_heads, head_width=width, codes=codes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    common_C = normal(width)
    needed = [(prefix + rows) // PAGE_TOKENS for rows, prefix in chunks]
    shuffled = torch.randperm(sum(needed) + 1, generator=generator, device=device)
    free = iter(shuffled[1:].tolist())
    page_ids = [[next(free) for _ in range(pages)] for pages in needed]
    total = sum(rows for rows, _ in chunks)
    q_THC = (normal(total, heads, width) + 0.3 * common_C).to(dtype)
    records = torch.full(
        (sum(needed) + 1, layout.record_bytes), 0x7F, dtype=torch.uint8, device=device
    )
    k_parts, v_parts, described, first = [], [], [], 0
    for (rows, prefix), pages in zip(chunks, page_ids, strict=True):
        k, v = normal(prefix + rows, kv_heads, width), normal(prefix + rows, kv_heads, width)
        v += normal(1, kv_heads, width)
        k[::97] *= 4.0
        v[::89] *= 4.0
        k[..., :2] += biased
        k[0] += sink * common_C
        k, v = k.to(dtype), v.to(dtype)
        starts = torch.arange(len(pages), device=device) * PAGE_TOKENS
        seal_pages(records, layout, k, v, starts, torch.tensor(pages, device=device).long())
        k_parts.append(k[prefix:])
        v_parts.append(v[prefix:])
        described.append((first, rows, prefix, pages))
        first += rows
    batch = describe_prefill(described, heads=heads, kv_heads=kv_heads, device=device)
    return PrefillInputs(
        q_THC=q_THC,
        k_TGC=torch.cat(k_parts),
        v_TGC=torch.cat(v_parts),
        records=records,
        layout=layout,
        batch=batch,
    )


def attention_flop(chunks: Sequence[tuple[int, int]], heads: int, width: int) -> float:
    """Of causal attention: 4 operations a query, key and channel, what is masked not counted."""
    pairs = sum(rows * prefix + rows * (rows + 1) / 2 for rows, prefix in chunks)
    return 4.0 * heads * width * pairs


def sdpa_baselines(inputs: PrefillInputs) -> dict[str, Callable[[], object]]:
    """16-bit causal attention of a single chunk without prefix, by library."""
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q_THC, inputs.k_TGC, inputs.v_TGC))

    def call(backend: SDPBackend) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return run

    return {
        "cuDNN": call(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention": call(SDPBackend.FLASH_ATTENTION),
    }


def _fastest(candidates: dict[str, Callable[[], object]]) -> tuple[str, Callable[[], object]]:
    def seconds(run: Callable[[], object]) -> float:
        try:
            run()
        except RuntimeError:  # not built into this PyTorch
            return float("inf")
        begin = torch.Event("cuda", enable_timing=True)
        end = torch.Event("cuda", enable_timing=True)
        begin.record()
        for _ in range(3):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return min(candidates.items(), key=lambda item: seconds(item[1]))


_CASES = (
    # name, chunks, query heads, KV heads, head width
    ("16k causal, 32/4 heads of 128", ((16384, 0),), 32, 4, 128),
    ("16k causal, 32/4 heads of 64", ((16384, 0),), 32, 4, 64),
    ("2k over 30k, 32/4 heads of 128", ((2048, 30720),), 32, 4, 128),
    ("ragged 8 chunks, 32/4 heads of 128", tuple((300 + 513 * i, 1024 * i) for i in range(8)), 32,
     4, 128),
)  # fmt: skip


def cases(device: torch.device) -> Iterator[Case]:
    """Both recipes; the baseline, where there is one, is the faster of cuDNN and FlashAttention."""
    for name, chunks, heads, kv_heads, width in _CASES:
        for codes in PageCodes:
            inputs = make_inputs(
                chunks, heads=heads, kv_heads=kv_heads, width=width, codes=codes, device=device
            )
            baseline = None
            if device.type == "cuda" and len(chunks) == 1 and chunks[0][1] == 0:
                baseline = _fastest(sdpa_baselines(inputs))
            yield Case(
                kernel="paged_attention_prefill",
                case=f"{name}, {codes} pages",
                run=inputs.attend,
                work=attention_flop(chunks, heads, width),
                unit="FLOP",
                ceiling="cuBLAS FP8",
                error=inputs.error,
                baseline=baseline[1] if baseline else None,
                baseline_name=f"{baseline[0]} bfloat16" if baseline else None,
                mark=1.5 if baseline and width == 128 else None,
            )
