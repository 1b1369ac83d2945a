"""Attention over 8-bit pages: close to attention over float ones, and the same however cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fourfold.kernels.pages.layout import PageCodes
from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages, PageShape, Span, make_pages
from fourfold.quadrants.step import lay_out
from tests.cpu.quadrants.attending import attend

HEADS, KV_HEADS, WIDTH = 6, 2, 16
CPU = torch.device("cpu")


def shape(codes: PageCodes | None) -> PageShape:
    return PageShape(
        layers=1, kv_heads=KV_HEADS, head_width=WIDTH, dtype=torch.float32, codes=codes
    )


def random_rows(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(length, heads, WIDTH, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k + 2, v


def attend_in_pieces(
    codes: PageCodes | None, rows: tuple[Tensor, Tensor, Tensor], cuts: list[int]
) -> Tensor:
    """All rows of one sequence, computed in pieces; pieces of one row are decode steps."""
    length = len(rows[0])
    pages = make_pages(shape(codes), 8, 3, CPU)
    table = [5, 0, 7, 2, 1][: -(-length // PAGE_TOKENS)]
    outputs = []
    for start, end in itertools.pairwise(cuts):
        span = [Span(start, end - start, table, slot=1)]
        rows_of_step = ([], span) if end - start > 1 else (span, [])
        step = lay_out(pages, *rows_of_step, heads=HEADS)
        outputs.append(attend(step, 0, *(tensor[start:end] for tensor in rows)))
    return torch.cat(outputs)


@pytest.mark.parametrize("codes", PageCodes)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 256])
def test_close_to_float_pages(codes: PageCodes, length: int) -> None:
    rows = random_rows(length)
    exact, out = (attend_in_pieces(kind, rows, [0, length]) for kind in (None, codes))
    off = (out - exact).norm() / exact.norm()
    assert off < (0.02 if codes is PageCodes.INT8 else 0.06)
    assert length <= PAGE_TOKENS or off > 0  # the pages really are in 8 bits


@pytest.mark.parametrize("codes", PageCodes)
@pytest.mark.parametrize(
    "cuts",
    [[0, 64, 128, 200], [0, 128, *range(129, 201)], list(range(201)), [0, 192, 200]],
    ids=["pages", "decoded from page 2", "all decoded", "tail"],
)
def test_cuts_do_not_change_the_answer(codes: PageCodes, cuts: list[int]) -> None:
    rows = random_rows(200)
    whole = attend_in_pieces(codes, rows, [0, 200])
    torch.testing.assert_close(attend_in_pieces(codes, rows, cuts), whole, rtol=1e-5, atol=1e-5)


def test_sequences_share_pages_and_steps() -> None:
    """Two sequences over the same sealed pages, decoded together and with another's chunk."""
    (q, k, v), (q2, k2, v2) = random_rows(130), random_rows(70)
    pages = make_pages(shape(PageCodes.INT8), 8, 4, CPU)
    first = Span(0, 128, [3, 4], slot=0)
    attend(lay_out(pages, [], [first], heads=HEADS), 0, q[:128], k[:128], v[:128])
    spans = [Span(128, 1, [3, 4, 6], slot=0), Span(128, 1, [3, 4, 1], slot=2)]
    chunk = Span(0, 70, [0, 7], slot=3)
    step = lay_out(pages, spans, [chunk], heads=HEADS)
    twice = [torch.cat((x[128:129], x[128:129], y)) for x, y in ((q, q2), (k, k2), (v, v2))]
    out = attend(step, 0, *twice)
    alone = attend_in_pieces(PageCodes.INT8, (q, k, v), [0, 128, 129])
    torch.testing.assert_close(out[:2], alone[128:].expand(2, -1, -1), rtol=1e-5, atol=1e-5)
    chunk_alone = attend_in_pieces(PageCodes.INT8, (q2, k2, v2), [0, 70])
    torch.testing.assert_close(out[2:], chunk_alone, rtol=1e-5, atol=1e-5)


def test_memory_is_what_the_shape_says() -> None:
    for codes in PageCodes:
        described = shape(codes)
        pages = make_pages(described, 5, 3, CPU)
        assert isinstance(pages, CodedPages)
        assert pages.records.numel() == 5 * described.page_bytes
        assert pages.open.numel() * 4 == 3 * described.slot_bytes
