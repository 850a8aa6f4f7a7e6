"""Who uses which page of the KV cache. Knows nothing of what a page holds or where it lies."""

from collections import Counter
from collections.abc import Iterable, Sequence

from engine.scheduling.prefix_cache import PrefixCache

PADDING_PAGE = 0
"""Padding tokens of a step are written here; it is never handed out."""


class PagePool:
    """Counts the users of each page.

    Invariant: each page but the padding page is in exactly one of three states.

        free ──allocate──► in use ──release──► free          (no key)
          ▲                 ▲   └──release──► idle           (published: others may find it)
          └──── evict ──────┼──────────────── │
                            └──── acquire ─────┘
    """

    def __init__(self, num_pages: int, prefix_cache: PrefixCache) -> None:
        self.num_pages = num_pages
        self.prefix_cache = prefix_cache
        self._num_users = [0] * num_pages
        # A stack: the page freed last is the likeliest to be in a cache of the machine.
        self._free = list(range(num_pages - 1, PADDING_PAGE, -1))

    @property
    def num_usable(self) -> int:
        """All pages that can be handed out, now used or not."""
        return self.num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give at once."""
        return len(self._free) + self.prefix_cache.num_idle

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_available

    def allocate(self, count: int) -> list[int] | None:
        """Take pages for writing, evicting idle ones if need be; None if there are too few."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self.prefix_cache.evict()
            self._num_users[page] = 1
            pages.append(page)
        return pages

    def acquire(self, page: int) -> None:
        """Become one more user of a published page, for reading."""
        self._num_users[page] += 1
        self.prefix_cache.mark_used(page)

    def release(self, pages: Sequence[int]) -> None:
        """Stop using pages, which are given in the order of their tokens.

        The last ones become idle first, hence are evicted first: a prefix is of use without its
        continuation, not the other way round.
        """
        for page in reversed(pages):
            self._num_users[page] -= 1
            if self._num_users[page] == 0:
                if self.prefix_cache.is_published(page):
                    self.prefix_cache.mark_idle(page)
                else:
                    self._free.append(page)

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the users counted are exactly the lists given."""
        users = Counter(page for pages in held for page in pages)
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert PADDING_PAGE not in free, "the padding page is free"
        assert PADDING_PAGE not in users, "the padding page is in use"
        for page in range(1, self.num_pages):
            assert self._num_users[page] == users[page], (
                f"page {page}: {self._num_users[page]} users counted, {users[page]} hold it"
            )
            idle = users[page] == 0 and self.prefix_cache.is_published(page)
            assert (page in free) == (users[page] == 0 and not idle), f"page {page} leaked"
        assert len(free) + self.prefix_cache.num_idle + len(users) == self.num_usable
        self.prefix_cache.check_integrity()
