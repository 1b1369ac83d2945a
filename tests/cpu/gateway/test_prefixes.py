"""What each worker should have cached."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fourfold.engine.messages import SamplingParams, Submit
from fourfold.engine.page_pool import ROOT_KEY
from fourfold.engine.sequence import Sequence
from fourfold.gateway.fleet.prefixes import PrefixIndex, page_keys


def test_pages_are_named_as_the_engine_names_them() -> None:
    tokens = tuple(range(300))
    request = Submit(request_id=1, prompt_ids=tokens, sampling=SamplingParams())
    sequence = Sequence(request, 0, 0, None, 400, ROOT_KEY)
    keys = page_keys(tokens, 64)
    assert keys == sequence.keys(300)
    assert len(keys) == 4
    assert page_keys(tokens, 64, keys[:2]) == keys
    assert page_keys(tokens[:63], 64) == []


def test_the_longest_prefix_counts_and_a_gap_ends_it() -> None:
    index = PrefixIndex()
    keys = page_keys(range(640), 64)
    index.add(1, keys[:3], 100)
    index.add(2, keys[4:], 100)
    assert [index.found(worker, keys) for worker in (1, 2, 3)] == [3, 0, 0]
    other = page_keys([5, *range(1, 640)], 64)
    assert index.found(1, other) == 0, "pages after another beginning are others"


def test_a_worker_that_has_gone_has_nothing() -> None:
    index = PrefixIndex()
    keys = page_keys(range(640), 64)
    for worker in (1, 2):
        index.add(worker, keys, 100)
    index.forget(1)
    assert [index.found(worker, keys) for worker in (1, 2)] == [0, 10]
    assert len(index) == 10


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 12))
def test_it_is_bounded_and_forgets_the_ends_of_what_was_used_longest_ago(
    texts: list[int], most: int
) -> None:
    index = PrefixIndex()
    chains = [page_keys([text] * 64 * 5, 64) for text in range(6)]
    for text in texts:
        index.add(1, chains[text], most)
        assert len(index) <= most
        assert index.found(1, chains[text]) == min(5, most)
