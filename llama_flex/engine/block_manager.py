"""Who has which page of a paged cache, and which pages hold what is computed already, so that prompts share it."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict

import numpy as np


class BlockManager:
    """Pages, how many rows use each, and what is known of their content, so that rows can share it.

    A page that nobody uses any more, but whose content is known, is kept until it is needed: the longest unused is
    taken first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.users = [0] * count
        self._free = list(range(count))[::-1]
        self._unused: OrderedDict[int, None] = OrderedDict()  # nobody's, but known; oldest first
        self._page_of: dict[bytes, int] = {}  # full pages by what they hold
        self._holds: dict[int, bytes] = {}
        self._after: dict[bytes, dict[int, np.ndarray]] = {}  # pages by what came before them, with their first tokens
        self._before: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """The number of pages that can be taken."""
        return len(self._free) + len(self._unused)

    def take(self) -> int:
        """Take a page for one row alone; there must be one."""
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
        self.users[page] = 1
        return page

    def find(self, content: bytes) -> int | None:
        """Find the page with this content and count one user more; return None if there is none."""
        page = self._page_of.get(content)
        if page is not None:
            self.users[page] += 1
            self._unused.pop(page, None)
        return page

    def find_beginning(self, before: bytes, tokens: np.ndarray) -> tuple[int, int]:
        """Return the page, of the newest few after `before`, that begins most like tokens `[3, N]`, and with how
        many."""
        best = -1, 0
        for page, held in itertools.islice(reversed(self._after.get(before, {}).items()), 8):
            n = min(held.shape[1], tokens.shape[1])
            differs = (held[:, :n] != tokens[:, :n]).any(0)
            best = max(best, (page, int(differs.argmax()) if differs.any() else n), key=operator.itemgetter(1))
        return best

    def name(self, page: int, content: bytes) -> None:
        """Record what a full page holds. A page of the same content that is known already stays the known one."""
        if content not in self._page_of and page not in self._holds:
            self._page_of[content], self._holds[page] = page, content

    def begin(self, page: int, before: bytes, tokens: np.ndarray) -> None:
        """Record with which tokens `[3, N]` a page begins, and after what; it may be filled further."""
        self._before[page] = before
        self._after.setdefault(before, {})[page] = tokens

    def give_back(self, page: int) -> None:
        """Count one user less."""
        self.users[page] -= 1
        if not self.users[page]:
            if page in self._before or page in self._holds:
                self._unused[page] = None
            else:
                self._free.append(page)
