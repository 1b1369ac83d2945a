"""Paged attention against attention over plain lists of keys and values, in float64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold.quadrants.decode_attention import group_by_length
from fourfold.quadrants.kv_pages import PAGE_TOKENS, FloatPages, PageShape, Span
from fourfold.quadrants.step import lay_out
from tests.cpu.quadrants.attending import attend

WIDTH = 16
LAYERS = 2
HEADS = [(6, 2), (4, 4), (5, 1)]  # query heads, KV heads
GROUP_COST = 2048


@dataclasses.dataclass
class Book:
    """Random keys and values of whole sequences, and pages in which they are being stored."""

    query_heads: int
    kv_heads: int
    lengths: Sequence[int]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        random = Random(sum(self.lengths))
        self.generator = torch.Generator().manual_seed(0)
        needed = [-(-length // PAGE_TOKENS) for length in self.lengths]
        free = random.sample(range(sum(needed) + 2), sum(needed) + 2)
        self.tables = [[free.pop() for _ in range(count)] for count in needed]
        shape = PageShape(layers=LAYERS, kv_heads=self.kv_heads, head_width=WIDTH, dtype=self.dtype)
        self.pages = FloatPages(shape, sum(needed) + 2, torch.device("cpu"))
        self.pages.data.fill_(1e4)  # what earlier owners of the pages left behind
        self.k, self.v, self.q = (
            [self._random(length, heads) for length in self.lengths]
            for heads in (self.kv_heads, self.kv_heads, self.query_heads)
        )

    def attend(
        self, decodes: Sequence[tuple[int, int]], prefills: Sequence[tuple[int, int, int]] = ()
    ) -> Tensor:
        """One step in each layer: decodes of (sequence, position), chunks of (sequence, start,
        end). Checks every row and returns the last layer's."""
        rows = [*((s, p, p + 1) for s, p in decodes), *prefills]
        spans = [Span(start, end - start, self.tables[s]) for s, start, end in rows]
        step = lay_out(
            self.pages, spans[: len(decodes)], spans[len(decodes) :], heads=self.query_heads
        )
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat([whole[s][layer, start:end] for s, start, end in rows])
                for whole in (self.q, self.k, self.v)
            )
            out = attend(step, layer, q, k, v)
            wanted = torch.cat([self._naive(layer, *row) for row in rows])
            rtol, atol = (1e-5, 1e-5) if self.dtype == torch.float32 else (0.0, 0.06)
            torch.testing.assert_close(out.double(), wanted, rtol=rtol, atol=atol)
        return out

    def store(self) -> None:
        """Writes all tokens but the last of each sequence."""
        for sequence, length in enumerate(self.lengths):
            writes = self.pages.writes([Span(0, length - 1, self.tables[sequence])])
            for layer in range(LAYERS):
                k, v = self.k[sequence][layer, :-1], self.v[sequence][layer, :-1]
                writes.before_attention(layer, k, v)

    def _naive(self, layer: int, sequence: int, start: int, end: int) -> Tensor:
        """Softmax of scaled products, one row and head after the other; [rows, H, C]."""
        shared = self.query_heads // self.kv_heads
        out = torch.empty(end - start, self.query_heads, WIDTH, dtype=torch.float64)
        for head in range(self.query_heads):
            q = self.q[sequence][layer, start:end, head].double()
            k = self.k[sequence][layer, :end, head // shared].double()
            v = self.v[sequence][layer, :end, head // shared].double()
            scores = q @ k.T / WIDTH**0.5
            later = torch.arange(end)[None] > torch.arange(start, end)[:, None]
            weights = scores.masked_fill(later, -torch.inf).exp()
            out[:, head] = weights / weights.sum(-1, keepdim=True) @ v
        return out

    def _random(self, length: int, heads: int) -> Tensor:
        return torch.randn(LAYERS, length, heads, WIDTH, generator=self.generator)


LENGTHS = [
    [1],
    [64],
    [65],
    [128, 1],
    [63, 1, 130, 64, 65],
    [2500, 1, 70, 2300, 5, 64],  # several groups
]


@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_decode(lengths: list[int], query_heads: int, kv_heads: int) -> None:
    book = Book(query_heads, kv_heads, lengths)
    book.store()
    book.attend([(sequence, length - 1) for sequence, length in enumerate(lengths)])


@pytest.mark.parametrize(("query_heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(
    "cuts",
    [[0, 1], [0, 1, 2], [0, 64, 128], [0, 63, 65, 66], [0, 70, 128, 191, 193], [0, 300]],
    ids=str,
)
def test_prefill_in_chunks(cuts: list[int], query_heads: int, kv_heads: int) -> None:
    book = Book(query_heads, kv_heads, [cuts[-1]])
    for start, end in itertools.pairwise(cuts):
        book.attend([], [(0, start, end)])


def test_one_step_of_everything() -> None:
    """Rows of decoding sequences, of a first chunk, of a later one, and of a last one of a row."""
    book = Book(6, 2, [70, 3, 150, 90, 65])
    book.attend([], [(0, 0, 69), (1, 0, 2), (3, 0, 60), (4, 0, 64)])
    book.attend([(1, 2), (0, 69)], [(3, 60, 90), (2, 0, 150), (4, 64, 65)])


def test_a_sequence_answers_the_same_alone_and_in_a_batch() -> None:
    """The padding that others need, and the group they fall in, change roundings only."""
    lengths = [2500, 64, 300, 7]
    book = Book(4, 2, lengths)
    book.store()
    together = book.attend([(s, length - 1) for s, length in enumerate(lengths)])
    for sequence, length in enumerate(lengths):
        alone = book.attend([(sequence, length - 1)])
        torch.testing.assert_close(together[sequence : sequence + 1], alone, rtol=0, atol=1e-6)


def test_sixteen_bit_pages() -> None:
    book = Book(6, 2, [130, 1, 64], torch.bfloat16)
    book.store()
    assert book.attend([(0, 129), (1, 0), (2, 63)]).dtype == torch.float32


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_groups_waste_little_and_are_few(lengths: list[int]) -> None:
    groups = group_by_length(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert sum(longest - lengths[index] for index in group) <= GROUP_COST
    for group, following in itertools.pairwise(groups):
        merged = [lengths[index] for index in [*group, following[0]]]
        assert min(merged) == merged[-1], "groups run from long to short"
        assert sum(max(merged) - length for length in merged) > GROUP_COST, "one group too many"


def test_equal_lengths_are_one_group() -> None:
    assert group_by_length([70] * 64) == [list(range(64))]
    assert group_by_length([]) == []
