"""Pages: their records, and what fills them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.pages import (
    PAGE_TOKENS,
    VALUE_ORDER,
    PageCodes,
    PageLayout,
    reference,
    seal_pages,
)
from fourfold.kernels.pages.triton_pages import launch_seal
from tests.cpu.kernels.codes import same_codes

POISON = 0x7F
CODES = list(PageCodes)


def keys_and_values(rows: int, layout: PageLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, layout.kv_heads, layout.head_width)
    k_SGC, v_SGC = (torch.randn(shape, generator=generator) for _ in range(2))
    k_SGC[..., 3] += 30
    v_SGC[rows // 2] *= 20
    return k_SGC.to(dtype), v_SGC.to(dtype)


def poisoned(pages: int, layout: PageLayout) -> Tensor:
    return torch.full((pages, layout.record_bytes), POISON, dtype=torch.uint8)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (3, 64), (8, 128)])
def test_a_record_is_keys_values_scales_and_padding(
    codes: PageCodes, heads: int, width: int
) -> None:
    layout = PageLayout(kv_heads=heads, head_width=width, codes=codes)
    assert layout.record_bytes % 128 == 0
    records = torch.zeros(2, layout.record_bytes, dtype=torch.uint8)
    views = layout.views(records)
    assert views.keys.shape == (2, heads, PAGE_TOKENS, width)
    assert views.values.shape == (2, heads, width, PAGE_TOKENS)
    assert views.scales.shape == (2, 2, heads)
    for number, view in enumerate(views, 1):
        view.copy_(torch.full(view.shape, float(number)))
    record = records[1]
    half = heads * PAGE_TOKENS * width
    one, two = (torch.tensor([float(n)]).to(codes.dtype).view(torch.uint8) for n in (1, 2))
    assert bool((record[:half] == one).all())
    assert bool((record[half : 2 * half] == two).all())
    end = 2 * half + 8 * heads
    assert record[2 * half : end].view(torch.float32).tolist() == [3.0] * (2 * heads)
    assert not record[end:].any()


def test_the_order_of_values_is_that_of_the_fragments() -> None:
    assert sorted(VALUE_ORDER) == list(range(PAGE_TOKENS))
    # Thread t of a quad holds scores of keys 2t, 2t + 1, 2t + 8, 2t + 9 of 16: its four bytes.
    for block in range(4):
        for t in range(4):
            of_thread = [16 * block + key for key in (2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9)]
            assert list(VALUE_ORDER[16 * block + 4 * t :][:4]) == of_thread


@pytest.mark.parametrize("codes", CODES)
def test_a_sealed_page_stands_for_its_rows(codes: PageCodes) -> None:
    layout = PageLayout(kv_heads=2, head_width=32, codes=codes)
    k_SGC, v_SGC = keys_and_values(150, layout, torch.bfloat16)
    records = poisoned(3, layout)
    seal_pages(records, layout, k_SGC, v_SGC, torch.tensor([7, 80]), torch.tensor([2, 0]))
    assert bool((records[1] == POISON).all())
    views = layout.views(records)
    for page, first in ((2, 7), (0, 80)):
        for kind, x_SGC in enumerate((k_SGC, v_SGC)):
            x_GNC = x_SGC[first : first + PAGE_TOKENS].double().transpose(0, 1)
            scale_G = views.scales[page, kind].double()
            largest = x_GNC.abs().amax((1, 2))
            torch.testing.assert_close(scale_G * codes.largest, largest, rtol=1e-6, atol=0)
            if kind == 0:
                codes_GNC = views.keys[page].double()
            else:
                codes_GNC = torch.empty(2, PAGE_TOKENS, 32, dtype=torch.float64)
                codes_GNC[:, list(VALUE_ORDER)] = views.values[page].double().transpose(1, 2)
            off = (codes_GNC * scale_G[:, None, None] - x_GNC).abs()
            step = scale_G[:, None, None] * (1 if codes is PageCodes.INT8 else 2**-9)
            relative = 0 if codes is PageCodes.INT8 else x_GNC.abs() / 16
            assert bool((off <= 0.5001 * step + relative).all())


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width", "index"), [(1, 16, torch.int32), (2, 64, torch.int64)])
def test_the_kernel_seals_the_references_bits(
    codes: PageCodes, dtype: torch.dtype, heads: int, width: int, index: torch.dtype
) -> None:
    layout = PageLayout(kv_heads=heads, head_width=width, codes=codes)
    k_SGC, v_SGC = keys_and_values(200, layout, dtype)
    k_SGC[64:128] = 0
    first_row_J = torch.tensor([64, 3, 0, 136], dtype=index)
    page_J = torch.tensor([1, 4, -1, 0], dtype=index)
    ours, theirs = poisoned(5, layout), poisoned(5, layout)
    launch_seal(ours, layout, k_SGC, v_SGC, first_row_J, page_J)
    reference.seal_pages(theirs, layout, k_SGC, v_SGC, first_row_J, page_J)
    views, expected = layout.views(ours), layout.views(theirs)
    assert same_codes(views.keys, expected.keys)
    assert same_codes(views.values, expected.values)
    assert torch.equal(ours[:, layout.code_bytes :], theirs[:, layout.code_bytes :])
    assert not views.keys[1].float().any()
    assert bool((views.scales[1] > 0).all())


def test_rows_may_be_parts_of_wider_ones() -> None:
    layout = PageLayout(kv_heads=2, head_width=16)
    wide = keys_and_values(70, PageLayout(kv_heads=6, head_width=16), torch.bfloat16)[0]
    k_SGC, v_SGC = wide[:, 1:3], wide[:, 4:]
    jobs = torch.tensor([5]), torch.tensor([0])
    ours, theirs = poisoned(1, layout), poisoned(1, layout)
    launch_seal(ours, layout, k_SGC, v_SGC, *jobs)
    reference.seal_pages(theirs, layout, k_SGC.contiguous(), v_SGC.contiguous(), *jobs)
    assert torch.equal(ours, theirs)


def test_no_jobs() -> None:
    layout = PageLayout(kv_heads=1, head_width=16)
    k_SGC, v_SGC = keys_and_values(64, layout, torch.bfloat16)
    records, nothing = poisoned(1, layout), torch.empty(0, dtype=torch.int32)
    for seal in (launch_seal, seal_pages):
        seal(records, layout, k_SGC, v_SGC, nothing, nothing)
    assert bool((records == POISON).all())
