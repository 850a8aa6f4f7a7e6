"""The page pool and its prefix cache under any order of calls."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.scheduling.page_pool import PADDING_PAGE, PagePool
from engine.scheduling.prefix_cache import PrefixCache, page_key, root_key


class PoolMachine(RuleBasedStateMachine):
    """Sequences of pages come, publish, share and go; a model dictionary says what each holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, PrefixCache())
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        available = self.pool.num_available
        pages = self.pool.allocate(count)
        assert (pages is None) == (count > available)
        if pages:
            for page in pages:
                self.content.pop(page, None)
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100), tokens=st.lists(st.integers(0, 2), min_size=6, max_size=6))
    def publish(self, which: int, tokens: list[int]) -> None:
        pages = self.held[which % len(self.held)]
        key = root_key(b"", 1.0)
        for page, token in zip(pages, tokens, strict=False):
            key = page_key(key, [token])
            known = self.pool.prefix_cache.find(key)
            if self.pool.prefix_cache.publish(key, page):
                assert known is None
                self.content[page] = key

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def share(self, tokens: list[int]) -> None:
        key = root_key(b"", 1.0)
        pages = []
        for token in tokens:
            key = page_key(key, [token])
            page = self.pool.prefix_cache.find(key)
            if page is None:
                break
            assert self.content[page] == key, "a page was found under tokens that it lost"
            pages.append(page)
        for page in pages:
            self.pool.acquire(page)
        if pages:
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        self.pool.release(self.held.pop(which % len(self.held)))

    @invariant()
    def every_page_is_in_exactly_one_state(self) -> None:
        self.pool.check_integrity(self.held)


TestPagePool = PoolMachine.TestCase
TestPagePool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_the_tail_of_a_prefix_is_evicted_before_its_head():
    pool = PagePool(4, PrefixCache())
    pages = pool.allocate(3)
    assert pages is not None
    key = root_key(b"", 1.0)
    for index, page in enumerate(pages):
        key = page_key(key, [index])
        pool.prefix_cache.publish(key, page)
    pool.release(pages)
    assert pool.allocate(1) == [pages[2]]
    assert pool.allocate(1) == [pages[1]]


def test_the_padding_page_is_never_handed_out():
    pool = PagePool(5, PrefixCache())
    pages = pool.allocate(4)
    assert pages is not None
    assert PADDING_PAGE not in pages
    assert pool.allocate(1) is None


def test_a_different_salt_or_rope_alpha_gives_different_keys():
    keys = {root_key(b"", 1.0), root_key(b"a", 1.0), root_key(b"", 3.0)}
    assert len(keys) == 3
