"""The page pool against a model that keeps lists and forgets nothing."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fourfold.engine.page_pool import ROOT_KEY, PageKey, PagePool, page_key

PAGES = 5
WORDS = st.integers(0, 1)  # few contents, so that chains meet often


def chain(words: list[int]) -> list[PageKey]:
    keys: list[PageKey] = []
    for word in words:
        keys.append(page_key(keys[-1] if keys else ROOT_KEY, [word]))
    return keys


class PoolMachine(RuleBasedStateMachine):
    """Owners take chains of pages as sequences do: find, share, allocate, publish, release.

    `held` lists each owner's pages in order, `words` the content an owner gives them, `content` the
    chain a page was published under, `released` the pages nobody owns that are findable, least
    recently released first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.held: list[list[int]] = []
        self.words: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        self.released: list[int] = []

    def owners(self, page: int) -> int:
        return sum(pages.count(page) for pages in self.held)

    def findable(self, words: list[int]) -> list[int]:
        by_content = {content: page for page, content in self.content.items()}
        found = []
        for length in range(1, len(words) + 1):
            page = by_content.get(tuple(words[:length]))
            if page is None:
                break
            found.append(page)
        return found

    def allocate(self) -> int:
        free = {p for p in range(PAGES) if not self.owners(p)} - set(self.released)
        page = self.pool.allocate()
        if free:
            assert page in free, "a page that can still be found was given out before a free one"
        else:
            assert page == self.released.pop(0), "not the least recently released page"
            del self.content[page]
        return page

    @rule(words=st.lists(WORDS, min_size=1, max_size=4))
    def begin(self, words: list[int]) -> None:
        found = self.pool.find(chain(words))
        assert found == self.findable(words)
        idle = sum(page in self.released for page in found)
        if len(words) - len(found) > self.pool.available - idle:
            return
        for page in found:
            self.pool.share(page)
            if page in self.released:
                self.released.remove(page)
        self.held.append(list(found))
        self.words.append(words)
        self.held[-1].extend(self.allocate() for _ in words[len(found) :])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """Seals the first pages of an owner, those already published among them."""
        owner = data.draw(st.integers(0, len(self.held) - 1))
        count = data.draw(st.integers(1, len(self.held[owner])))
        words = self.words[owner]
        for length, key in enumerate(chain(words)[:count], 1):
            page = self.held[owner][length - 1]
            self.pool.publish(page, key)
            taken = tuple(words[:length]) in self.content.values()
            if not taken and page not in self.content:
                self.content[page] = tuple(words[:length])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        owner = data.draw(st.integers(0, len(self.held) - 1))
        self.words.pop(owner)
        pages = self.held.pop(owner)
        self.pool.release(pages)
        # Deep pages of a chain are given out before shallow ones.
        for page in reversed(pages):
            if not self.owners(page) and page in self.content:
                self.released.append(page)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        assert [self.pool.owners(p) for p in range(PAGES)] == [self.owners(p) for p in range(PAGES)]
        in_use = len({page for pages in self.held for page in pages})
        assert self.pool.in_use == in_use
        assert self.pool.available + self.pool.in_use == self.pool.total == PAGES
        assert self.pool.idle == len(self.released)
        for pages in self.held:
            assert len(set(pages)) == len(pages), "one sequence holds a page twice"

    def teardown(self) -> None:
        """Nothing was lost: once all owners let go, every page can be given out exactly once."""
        for pages in self.held:
            self.pool.release(pages)
        assert sorted(self.pool.allocate() for _ in range(PAGES)) == list(range(PAGES))
        assert (self.pool.available, self.pool.idle) == (0, 0)


TestPagePool = PoolMachine.TestCase
TestPagePool.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, derandomize=True
)


def test_idle_pages_go_deepest_and_longest_released_first() -> None:
    pool = PagePool(6)
    chains = [chain([7, 8, 9]), chain([4, 5, 6])]
    owned = [[pool.allocate() for _ in keys] for keys in chains]
    for pages, keys in zip(owned, chains, strict=True):
        for page, key in zip(pages, keys, strict=True):
            pool.publish(page, key)
    pool.release(owned[1])
    pool.release(owned[0])
    assert [pool.allocate() for _ in range(4)] == [*reversed(owned[1]), owned[0][2]]
    assert pool.find(chains[0]) == owned[0][:2]
    assert pool.find(chains[1]) == []


def test_a_page_keeps_its_first_key() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    first, second = chain([1]), chain([2])
    pool.publish(page, first[0])
    pool.publish(page, second[0])
    assert (pool.find(first), pool.find(second)) == ([page], [])


def test_a_key_names_all_pages_before_it() -> None:
    keys = [
        page_key(previous, tokens)
        for previous in (ROOT_KEY, page_key(ROOT_KEY, [1]), page_key(ROOT_KEY, [2]))
        for tokens in ([1, 2], [2, 1], [1], [1 << 40], [-1])
    ]
    assert len(set(keys)) == len(keys)
    assert page_key(ROOT_KEY, [1, 2]) == page_key(b"", (1, 2))
