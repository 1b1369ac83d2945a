"""Prefill attention over pages: the reference against float64, the Triton form against it.

The Triton form runs in the interpreter, so shapes are small and odd, and in float16: the
interpreter cannot multiply bfloat16.
"""

from __future__ import annotations

import pytest
import torch

from fourfold.bench.kernels.cases.prefill_attention import PrefillInputs, make_inputs
from fourfold.kernels.pages.layout import PageCodes, PageLayout
from fourfold.kernels.prefill_attention.attention import launch_prefill
from fourfold.kernels.prefill_attention.batch import describe_prefill
from fourfold.kernels.prefill_attention.choose import PrefillChoice, choose_prefill
from fourfold.kernels.tolerance import TOLERANCES

CPU = torch.device("cpu")
ALLOWED = TOLERANCES["paged_attention_prefill"]
TRITON = PrefillChoice("triton")

SHAPES = {
    "one token": [(1, 0)],
    "a full page": [(64, 0)],
    "a page and a token": [(65, 0)],
    "one token over a prefix": [(1, 128)],
    "odd over a prefix": [(77, 192)],
    "ragged": [(3, 64), (130, 0), (64, 128), (1, 0)],
}


def inputs(chunks: list[tuple[int, int]], *, heads: int = 4, kv_heads: int = 2, **more):
    return make_inputs(
        chunks, heads=heads, kv_heads=kv_heads, width=64, device=CPU, **{"seed": 3, **more}
    )


def by_triton(case: PrefillInputs) -> torch.Tensor:
    return launch_prefill(
        TRITON, case.q_THC, case.k_TGC, case.v_TGC, case.records, case.layout, case.batch,
        scale=case.layout.head_width**-0.5,
    )  # fmt: skip


def distance(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("codes", PageCodes)
@pytest.mark.parametrize("name", SHAPES)
def test_reference_is_attention(name: str, codes: PageCodes) -> None:
    case = inputs(SHAPES[name], codes=codes)
    assert case.error() < ALLOWED[codes]


@pytest.mark.parametrize("group", [1, 2, 7, 8])
def test_reference_of_grouped_queries(group: int) -> None:
    assert inputs([(70, 64)], heads=2 * group, kv_heads=2).error() < ALLOWED["int8"]


def test_a_sink_leaves_the_tail_its_precision() -> None:
    """A key that outweighs all others a hundredfold: the rest, by itself, is still precise."""
    case = inputs([(64, 640)], sink=4.0)
    assert case.error() < ALLOWED["int8"]
    plain = case.attend()
    views = case.layout.views(case.records)
    views.values[case.batch.chunks[0].page_ids[0]] = 0
    rows = torch.arange(0, 64, 7)
    wanted = case.exact(0, rows)
    assert distance(case.attend()[rows], wanted) < 2 * ALLOWED["int8"]
    assert distance(plain[rows], wanted) > 0.2, "the sink had weight"


def test_results_do_not_depend_on_chunking() -> None:
    whole = inputs([(192, 64)])
    described = whole.batch.chunks[0]
    cut = describe_prefill(
        [(0, 64, 64, described.page_ids), (64, 128, 128, described.page_ids)],
        heads=4,
        kv_heads=2,
        device=CPU,
    )
    parts = launch_prefill(
        PrefillChoice("reference"), whole.q_THC, whole.k_TGC, whole.v_TGC, whole.records,
        whole.layout, cut, scale=0.125,
    )  # fmt: skip
    assert distance(parts, whole.attend()) < 1e-3


@pytest.mark.parametrize("codes", PageCodes)
@pytest.mark.parametrize("name", ["one token", "odd over a prefix", "ragged"])
def test_triton_is_the_reference(name: str, codes: PageCodes) -> None:
    case = inputs(SHAPES[name], codes=codes, dtype=torch.float16)
    # The interpreter rounds to e4m3 towards zero.
    close = 4e-3 if codes is PageCodes.INT8 else 0.05
    assert distance(by_triton(case), case.attend()) < close


@pytest.mark.parametrize("group", [1, 7, 8])
def test_triton_of_grouped_queries(group: int) -> None:
    case = inputs([(66, 64)], heads=group, kv_heads=1, dtype=torch.float16, biased=30.0, sink=2.0)
    assert distance(by_triton(case), case.attend()) < 4e-3


def test_tiles_cover_every_row_once_and_the_longest_comes_first() -> None:
    rows = [130, 1, 64]
    batch = describe_prefill(
        [(0, rows[0], 640, range(20)), (130, rows[1], 0, ()), (131, rows[2], 64, range(20))],
        heads=12,
        kv_heads=2,
        device=CPU,
    )
    tokens = 2 * 64 // batch.padded_group
    assert batch.padded_group == 8
    empty = len(rows)
    assert batch.lengths_B.tolist() == [*rows, 0]
    tiles = [tile for tile in batch.tiles_W2.tolist() if tile[0] != empty]
    covered = [
        (chunk, token)
        for chunk, first in tiles
        for token in range(first, min(first + tokens, rows[chunk]))
    ]
    assert sorted(covered) == [(i, token) for i, n in enumerate(rows) for token in range(n)]
    assert batch.tiles_W2[: len(tiles)].tolist() == tiles
    assert tiles[0][0] == 0
    assert tiles[-1] == [1, 0]


def test_the_choice_follows_hardware_and_shape() -> None:
    layout = PageLayout(kv_heads=4, head_width=128)
    fp8 = PageLayout(kv_heads=4, head_width=128, codes=PageCodes.FP8)
    assert choose_prefill(layout, 32, None).backend == "reference"
    assert choose_prefill(layout, 32, (8, 0)).backend == "triton"
    assert choose_prefill(fp8, 32, (8, 0)).backend == "reference"
    assert choose_prefill(fp8, 32, (8, 9)).backend == "triton"
    assert choose_prefill(layout, 32, (9, 0)) == PrefillChoice("gluon", stages=8)
    assert choose_prefill(PageLayout(kv_heads=2, head_width=96), 4, (9, 0)).backend == "reference"
