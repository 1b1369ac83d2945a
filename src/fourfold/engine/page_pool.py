"""Who uses which KV page, and which sealed pages can be found again.

A page is free, owned by one or more sequences, or idle: owned by nobody but still findable by the
hash chain of its tokens. Idle pages are given out again when free ones run out, least recently
released first. This is bookkeeping alone; the tensors are in `quadrants.kv_pages`.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict, deque
from collections.abc import Sequence

PageKey = bytes
ROOT_KEY: PageKey = b""


def page_key(previous: PageKey, tokens: Sequence[int]) -> PageKey:
    """The key of a full page: a 128-bit hash of its tokens and of all pages before it."""
    packed = struct.pack(f"<{len(tokens)}q", *tokens)
    return hashlib.blake2b(previous + packed, digest_size=16).digest()


class PagePool:
    """A fixed number of pages with owners counted. Not thread-safe: the scheduler alone uses it."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self._free = deque(range(pages))
        self._owners = [0] * pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can give out now."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        """Pages with at least one owner."""
        return self.total - self.available

    @property
    def idle(self) -> int:
        """Pages without an owner that a prefix may still find."""
        return len(self._idle)

    def owners(self, page: int) -> int:
        return self._owners[page]

    def allocate(self) -> int:
        """A page with one owner and no key. The caller has checked `available`."""
        if self._free:
            page = self._free.popleft()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        assert self._owners[page] == 0
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """One owner more, of a page that is owned or idle."""
        if self._owners[page] == 0:
            del self._idle[page]
        self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One owner less of each, given in sequence order; the last page of a chain goes first
        when idle pages are needed, because without the earlier ones it could not be found."""
        for page in reversed(pages):
            assert self._owners[page] > 0, f"page {page} released without an owner"
            self._owners[page] -= 1
            if self._owners[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, key: PageKey) -> None:
        """Makes a full page findable. Where the same content is already findable, that one stays
        and this page remains its owner's alone."""
        assert self._owners[page] > 0
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, keys: Sequence[PageKey]) -> list[int]:
        """The pages of the longest findable prefix of a hash chain; owners are not changed."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages
