"""Which pages of which texts each worker should have: what was sent there before.

A guess, never a promise: a worker looks for itself. Pages are named by the chain of hashes that
the workers use too (`engine.page_pool.page_key`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from fourfold.engine.page_pool import ROOT_KEY, PageKey, page_key


def page_keys(
    tokens: Sequence[int], page_tokens: int, known: Sequence[PageKey] = ()
) -> list[PageKey]:
    """The keys of all pages that `tokens` fill, of which the first `known` are known."""
    keys = list(known)
    for start in range(len(keys) * page_tokens, len(tokens) - page_tokens + 1, page_tokens):
        previous = keys[-1] if keys else ROOT_KEY
        keys.append(page_key(previous, tokens[start : start + page_tokens]))
    return keys


class PrefixIndex:
    """The pages of every worker, least recently used first; as many as it can hold at most."""

    def __init__(self) -> None:
        self._pages: dict[int, OrderedDict[PageKey, None]] = {}

    def add(self, worker: int, keys: Sequence[PageKey], most: int) -> None:
        """A worker computes the pages of this chain and can hold `most` pages."""
        pages = self._pages.setdefault(worker, OrderedDict())
        # The last page of a chain is forgotten first: without the others it could not be found.
        for key in reversed(keys):
            pages[key] = None
            pages.move_to_end(key)
        while len(pages) > most:
            pages.popitem(last=False)

    def found(self, worker: int, keys: Sequence[PageKey]) -> int:
        """How many pages of a chain, from its first, a worker should have."""
        pages = self._pages.get(worker, ())
        return next((place for place, key in enumerate(keys) if key not in pages), len(keys))

    def forget(self, worker: int) -> None:
        """A worker has gone, and its pages with it."""
        self._pages.pop(worker, None)

    def __len__(self) -> int:
        return sum(map(len, self._pages.values()))
