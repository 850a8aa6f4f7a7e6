"""Which page holds which tokens: full pages found again by everything that precedes them.

A page's key is a digest of its own tokens and of the key of the page before it, so equal keys mean
equal prefixes, whoever computed them. Knows pages only as numbers; who may use them is the pool's
affair.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

_DIGEST_BYTES = 16


def root_key(cache_salt: bytes, rope_alpha: float) -> bytes:
    """The key before the first page: prompts with different ones never share a page."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    digest.update(f"{rope_alpha!r}|".encode())
    digest.update(cache_salt)
    return digest.digest()


def page_key(previous: bytes, token_ids: Iterable[int]) -> bytes:
    """The key of a full page whose predecessor has the key `previous`."""
    tokens = np.fromiter(token_ids, np.int32).tobytes()
    return hashlib.blake2b(previous + tokens, digest_size=_DIGEST_BYTES).digest()


class PrefixCache:
    """Maps keys to pages, and orders the pages that nobody uses by when they were last used.

    Invariant: a page has at most one key and a key at most one page; an idle page has a key.
    """

    def __init__(self) -> None:
        self._page_of_key: dict[bytes, int] = {}
        self._key_of_page: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, key: bytes) -> int | None:
        """The page that holds this key's tokens, or None."""
        return self._page_of_key.get(key)

    def publish(self, key: bytes, page: int) -> bool:
        """Offer a full page for sharing; False if another page holds the same tokens already."""
        if key in self._page_of_key or page in self._key_of_page:
            return False
        self._page_of_key[key] = page
        self._key_of_page[page] = key
        return True

    def is_published(self, page: int) -> bool:
        return page in self._key_of_page

    def mark_idle(self, page: int) -> None:
        """Nobody uses this published page any longer: it is the last to be evicted of all idle."""
        self._idle[page] = None

    def mark_used(self, page: int) -> None:
        self._idle.pop(page, None)

    def evict(self) -> int:
        """Forget the idle page that was used longest ago, and return it.

        Raises:
            KeyError: If no page is idle.
        """
        page, _ = self._idle.popitem(last=False)
        del self._page_of_key[self._key_of_page.pop(page)]
        return page

    def check_integrity(self) -> None:
        """Raise AssertionError where the invariant does not hold."""
        assert len(self._page_of_key) == len(self._key_of_page)
        for key, page in self._page_of_key.items():
            assert self._key_of_page[page] == key, f"page {page} has two keys"
        for page in self._idle:
            assert page in self._key_of_page, f"idle page {page} has no key"
