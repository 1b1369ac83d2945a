"""Prefill attention's kernels against the reference and against float64."""

from __future__ import annotations

import pytest
import torch

from fourfold.bench.kernels.cases.prefill_attention import PrefillInputs, make_inputs
from fourfold.kernels.pages.layout import PageCodes
from fourfold.kernels.prefill_attention.attention import launch_prefill
from fourfold.kernels.prefill_attention.choose import PrefillChoice, choose_prefill
from fourfold.kernels.tolerance import TOLERANCES

GPU = torch.device("cuda:0")
ALLOWED = TOLERANCES["paged_attention_prefill"]
CLOSE = {PageCodes.INT8: 4e-3, PageCodes.FP8: 0.015}
"""Kernel to reference: a rare code rounds the other way, and 16-bit outputs."""

SHAPES = {
    "one token": [(1, 0)],
    "a full page": [(64, 0)],
    "a page and a token": [(65, 0)],
    "one token over a prefix": [(1, 64 * 11)],
    "odd over a long prefix": [(333, 64 * 40)],
    "ragged": [(3, 64), (130, 0), (700, 128), (1, 0), (64, 1024), (255, 64 * 9)],
}


def choices(case: PrefillInputs) -> list[PrefillChoice]:
    best = choose_prefill(case.layout, case.batch.heads, torch.cuda.get_device_capability())
    return [PrefillChoice("triton", stages=3)] + ([best] if best.backend == "gluon" else [])


def run(choice: PrefillChoice, case: PrefillInputs) -> torch.Tensor:
    scale = case.layout.head_width**-0.5
    return launch_prefill(
        choice, case.q_THC, case.k_TGC, case.v_TGC, case.records, case.layout, case.batch,
        scale=scale,
    )  # fmt: skip


def distance(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


def agree(case: PrefillInputs) -> None:
    wanted = run(PrefillChoice("reference"), case)
    for choice in choices(case):
        torch.empty_like(wanted).fill_(torch.nan)  # what the allocator hands out next
        out = run(choice, case)
        assert out.isfinite().all(), choice
        assert distance(out, wanted) < CLOSE[case.layout.codes], choice
        for _ in range(2):
            assert torch.equal(run(choice, case), out), choice
    assert case.error() < ALLOWED[case.layout.codes]


@pytest.mark.parametrize("codes", PageCodes)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, width: int, codes: PageCodes) -> None:
    agree(make_inputs(SHAPES[name], heads=16, kv_heads=2, width=width, codes=codes, device=GPU))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(3, 3), (8, 4), (7, 1), (12, 2), (64, 1), (62, 31)])
def test_grouped_queries(heads: tuple[int, int], dtype: torch.dtype) -> None:
    h, g = heads
    agree(make_inputs([(200, 128)], heads=h, kv_heads=g, width=64, dtype=dtype, device=GPU))


@pytest.mark.parametrize("codes", PageCodes)
def test_outliers(codes: PageCodes) -> None:
    agree(
        make_inputs(
            [(500, 1280)], heads=8, kv_heads=2, width=128, codes=codes, device=GPU, sink=3.0
        )
    )


def test_biased_keys() -> None:
    """Coarse codes, but the kernels round as the reference does."""
    case = make_inputs([(500, 1280)], heads=8, kv_heads=2, width=128, device=GPU, biased=30.0)
    wanted = run(PrefillChoice("reference"), case)
    for choice in choices(case):
        assert distance(run(choice, case), wanted) < CLOSE[PageCodes.INT8]


def test_rows_after_a_chunk_may_hold_anything() -> None:
    """Padding of a step: NaN in keys and values that no row may see."""
    case = make_inputs([(70, 64), (64, 0)], heads=8, kv_heads=2, width=128, device=GPU)
    wanted = [run(choice, case)[:70] for choice in choices(case)]
    case.k_TGC[70:] = torch.nan
    case.v_TGC[70:] = torch.nan
    for choice, before in zip(choices(case), wanted, strict=True):
        assert torch.equal(run(choice, case)[:70], before), choice


def test_strided_rows() -> None:
    """q, k and v as parts of one projection's output."""
    case = make_inputs([(150, 64)], heads=8, kv_heads=2, width=64, device=GPU)
    fused = torch.cat((case.q_THC, case.k_TGC, case.v_TGC), 1)
    q, k, v = fused.split((8, 2, 2), 1)
    for choice in choices(case):
        out = launch_prefill(choice, q, k, v, case.records, case.layout, case.batch, scale=0.125)
        assert torch.equal(out, run(choice, case)), choice


@pytest.mark.parametrize("codes", PageCodes)
def test_accumulation_over_128k_tokens(codes: PageCodes) -> None:
    """As precise over a long context as over a short one."""
    case = make_inputs(
        [(128, 131072)], heads=8, kv_heads=1, width=128, codes=codes, device=GPU, sink=2.0
    )
    assert case.error() < ALLOWED[codes]


def test_a_graph_replays_it() -> None:
    case = make_inputs([(200, 128)], heads=8, kv_heads=2, width=128, device=GPU)
    wanted = case.attend().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.attend()
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, wanted)
