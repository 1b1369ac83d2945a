"""Filling pages on a GPU: the reference's bits, and nothing beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.pages import (
    PAGE_TOKENS,
    PageCodes,
    PageLayout,
    hash_pages,
    move_pages,
    reference,
    seal_pages,
)
from fourfold.kernels.pages.move import reference_hash


def keys_and_values(rows: int, layout: PageLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (rows, layout.kv_heads, layout.head_width)
    k_SGC, v_SGC = (torch.randn(shape, device="cuda") for _ in range(2))
    k_SGC[..., 3] += 30
    v_SGC[rows // 2] *= 20
    return k_SGC.to(dtype), v_SGC.to(dtype)


def poisoned(pages: int, layout: PageLayout) -> Tensor:
    return torch.full((pages, layout.record_bytes), 0x7F, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("codes", list(PageCodes))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "width"), [(1, 64), (3, 64), (4, 128)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_sealed_records_are_the_references_bits(
    codes: PageCodes, dtype: torch.dtype, heads: int, width: int, index: torch.dtype
) -> None:
    layout = PageLayout(kv_heads=heads, head_width=width, codes=codes)
    jobs, pages = 40, 64
    k_SGC, v_SGC = keys_and_values(jobs * PAGE_TOKENS + 17, layout, dtype)
    k_SGC[17 : 17 + PAGE_TOKENS] = 0
    first_row_J = torch.arange(jobs, device="cuda", dtype=index) * PAGE_TOKENS + 17
    page_J = torch.randperm(pages, device="cuda")[:jobs].to(index)
    page_J[5] = -1
    ours, again, theirs = (poisoned(pages, layout) for _ in range(3))
    for records in (ours, again):
        seal_pages(records, layout, k_SGC, v_SGC, first_row_J, page_J)
    reference.seal_pages(theirs, layout, k_SGC, v_SGC, first_row_J, page_J)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, again)


def test_records_of_one_layer_among_others_far_into_memory() -> None:
    layout = PageLayout(kv_heads=8, head_width=128)
    pages = 2**31 // layout.record_bytes + 3
    records = torch.empty(pages, layout.record_bytes, dtype=torch.uint8, device="cuda")
    k_SGC, v_SGC = keys_and_values(PAGE_TOKENS, layout, torch.bfloat16)
    jobs = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.tensor([pages - 1]).int().cuda()
    seal_pages(records, layout, k_SGC, v_SGC, *jobs)
    theirs = poisoned(1, layout)
    reference.seal_pages(theirs, layout, k_SGC, v_SGC, jobs[0], torch.zeros_like(jobs[1]))
    assert torch.equal(records[-1, : layout.code_bytes + 64], theirs[0, : layout.code_bytes + 64])


def test_a_list_of_jobs_can_be_replayed() -> None:
    layout = PageLayout(kv_heads=2, head_width=64)
    k_SGC, v_SGC = keys_and_values(256, layout, torch.bfloat16)
    first_row_J, page_J = torch.zeros(2, 4, dtype=torch.int32, device="cuda")
    page_J.fill_(-1)
    ours, theirs = poisoned(4, layout), poisoned(4, layout)
    seal_pages(ours, layout, k_SGC, v_SGC, first_row_J, page_J)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seal_pages(ours, layout, k_SGC, v_SGC, first_row_J, page_J)
    graph.replay()
    assert torch.equal(ours, theirs)
    first_row_J.copy_(torch.tensor([64, 3, 0, 100]))
    page_J.copy_(torch.tensor([2, -1, 0, 3]))
    graph.replay()
    reference.seal_pages(theirs, layout, k_SGC, v_SGC, first_row_J, page_J)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [128, 640, 65536 + 128])
def test_pages_move_with_the_references_hash(size: int) -> None:
    layers, jobs = 5, 37
    shape = (layers, 64, size)
    source = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    target = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    from_J, to_J = (torch.randperm(64, device="cuda")[:jobs] for _ in range(2))
    wanted = target.clone()
    wanted[:, to_J] = source[:, from_J]
    hashes = move_pages(target, to_J, source, from_J)
    assert torch.equal(target, wanted)
    assert torch.equal(hashes.cpu(), reference_hash(source.cpu(), from_J.cpu()))
    assert torch.equal(hash_pages(source, from_J), hashes)
