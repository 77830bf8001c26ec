"""Who holds which page of the latent cache, and which pages can be shared. Plain Python: the tensor is the model's.

A full page is known by a digest of every token up to its end, so equal beginnings of conversations find each other's
pages. Nobody writes to a full page again, so sharing needs no copies: a page just has several holders. When its last
holder leaves, a known page stays, least recently used first in line for whoever needs room.
"""

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """Pages 0 … n-1 of `page_size` tokens each.

    `lookahead`: how many tokens after a page its content depends on; 1 with an MTP module, whose latent of a token
    is made from the token after it too.
    """

    def __init__(self, n_pages: int, page_size: int, lookahead: int = 0):
        self.n_pages, self.page_size, self.lookahead = n_pages, page_size, lookahead
        self._free = list(range(n_pages))  # a heap: the lowest first, so that sequences mostly hold neighbours
        self._holders = [0] * n_pages
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages nobody holds, least recently used first

    @property
    def n_available(self) -> int:
        """Pages that could be taken now: free ones, and idle ones that would be forgotten."""
        return len(self._free) + len(self._idle)

    def take(self, n: int) -> list[int] | None:
        """n pages with one holder each, in rising order where they were free; None if so many are not available."""
        if n > self.n_available:
            return None
        pages = []
        for _ in range(n):
            if self._free:
                page = heapq.heappop(self._free)
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One holder leaves these pages. The last of them goes first in line: a page is no use without those before."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} has no holder"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    heapq.heappush(self._free, page)

    def digests(self, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """The digest of each full page of `tokens` whose lookahead is there too; `known` are the first of them."""
        out = list(known)
        while (len(out) + 1) * self.page_size + self.lookahead <= len(tokens):
            at = len(out) * self.page_size
            part = array("q", tokens[at : at + self.page_size + self.lookahead])
            before = out[-1] if out else b""
            out.append(hashlib.blake2b(before + part.tobytes(), digest_size=16).digest())
        return out

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning, each with one holder more."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._idle.pop(page, None)
            self._holders[page] += 1
            pages.append(page)
        return pages

    def learn(self, page: int, digest: bytes) -> None:
        """A held page is full and has this digest. The first page with a digest is the one that is found."""
        assert self._holders[page] > 0
        if page not in self._digest_of and digest not in self._page_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def forget(self, pages: Sequence[int]) -> None:
        """Held pages lose their digests: nobody else is to find what is in them."""
        for page in pages:
            if page in self._digest_of:
                del self._page_of[self._digest_of.pop(page)]

    def forget_all(self) -> None:
        """Forgets every digest, so that nothing computed so far is found again; holders keep their pages."""
        for page in self._idle:
            heapq.heappush(self._free, page)
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """`held`: the pages of every holder. Each page is free, idle or held by exactly its holders."""
        counts = [0] * self.n_pages
        for pages in held:
            assert len(set(pages)) == len(pages), "one holder has a page twice"
            for page in pages:
                counts[page] += 1
        assert counts == self._holders, "holders miscounted"
        idle, free = set(self._idle), set(self._free)
        assert len(free) == len(self._free) and not free & idle, "a page is free twice"
        assert free | idle == {p for p in range(self.n_pages) if counts[p] == 0}, "a page is lost or lent while free"
        known = set(self._digest_of)
        assert idle <= known and not free & known, "an idle page without digest, or a free one with"
        assert {d: p for p, d in self._digest_of.items()} == self._page_of, "digests out of step"
