"""Allocate the pages of a paged cache, and index their content, so that prompts with a common prefix share pages."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict

import numpy as np


class BlockManager:
    """The pages of a pool: a reference count for each, and an index of their content, so that sequences can share them.

    A page without users whose content is known stays cached until its memory is needed; the one unused for longest is
    evicted first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.ref_counts = [0] * num_pages
        self._free = list(range(num_pages))[::-1]
        self._unused: OrderedDict[int, None] = OrderedDict()  # no users, but known content; oldest first
        self._page_of: dict[bytes, int] = {}  # full pages by content
        self._holds: dict[int, bytes] = {}
        self._after: dict[bytes, dict[int, np.ndarray]] = {}  # pages by the prefix before them, with their first tokens
        self._before: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """The number of pages that can be taken."""
        return len(self._free) + len(self._unused)

    def allocate(self) -> int:
        """Allocate a page to one user, evicting a cached page if none is free; one must be available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            if page in self._holds:
                del self._page_of[self._holds.pop(page)]
            if page in self._before:
                before = self._before.pop(page)
                del self._after[before][page]
                if not self._after[before]:
                    del self._after[before]
        self.ref_counts[page] = 1
        return page

    def acquire(self, content: bytes) -> int | None:
        """Return the full page with this content and add a user to it; return None if there is none."""
        page = self._page_of.get(content)
        if page is not None:
            self.ref_counts[page] += 1
            self._unused.pop(page, None)
        return page

    def find_partial(self, before: bytes, tokens: np.ndarray) -> tuple[int, int]:
        """Return the page with the most leading tokens equal to `tokens` `[3, N]`, of the 8 newest that follow prefix
        `before`, and how many are equal; (-1, 0) if none is."""
        best = -1, 0
        for page, held in itertools.islice(reversed(self._after.get(before, {}).items()), 8):
            n = min(held.shape[1], tokens.shape[1])
            differs = (held[:, :n] != tokens[:, :n]).any(0)
            best = max(best, (page, int(differs.argmax()) if differs.any() else n), key=operator.itemgetter(1))
        return best

    def register_full(self, page: int, content: bytes) -> None:
        """Register the content of a full page. If another page is registered for that content, it stays."""
        if content not in self._page_of and page not in self._holds:
            self._page_of[content], self._holds[page] = page, content

    def register_partial(self, page: int, before: bytes, tokens: np.ndarray) -> None:
        """Register the first tokens `[3, N]` of a page and the prefix before it; the page may be filled further."""
        self._before[page] = before
        self._after.setdefault(before, {})[page] = tokens

    def free(self, page: int) -> None:
        """Remove a user of a page; without users, a page of known content stays cached and any other is free."""
        self.ref_counts[page] -= 1
        if not self.ref_counts[page]:
            if page in self._before or page in self._holds:
                self._unused[page] = None
            else:
                self._free.append(page)
