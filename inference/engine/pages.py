"""The page pool of the latent cache: which pages are free, held or shared. Plain Python: the tensor is the model's.

A full page is registered under a digest of every token up to its end, so sequences with equal prefixes find each
other's pages. A full page is never written again, so it is shared without a copy: its reference count says by how many
sequences. A registered page without references stays cached until its place is needed, least recently used first.
"""

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """n pages of `page_size` tokens each, numbered from `first` on.

    `lookahead`: how many tokens after a page its content depends on; 1 with an MTP module, whose latent of a token
    is computed from the next token too.
    """

    def __init__(self, n_pages: int, page_size: int, lookahead: int = 0, first: int = 0):
        self.n_pages, self.page_size, self.lookahead, self.first = n_pages, page_size, lookahead, first
        # a heap: the lowest first, so that a sequence's pages are mostly neighbours
        self._free = list(range(first, first + n_pages))
        self._ref_counts = [0] * (first + n_pages)
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered, no references; least recently used first

    @property
    def n_available(self) -> int:
        """Pages that could be allocated now: free ones, and idle ones that would be unregistered."""
        return len(self._free) + len(self._idle)

    def allocate(self, n: int) -> list[int] | None:
        """n pages with one reference each, in rising order where they were free; None if too few are available."""
        if n > self.n_available:
            return None
        pages = []
        for _ in range(n):
            if self._free:
                page = heapq.heappop(self._free)
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
            self._ref_counts[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference to each page of a sequence. Its last page becomes the first to be evicted, because a page
        is of no use without those before it."""
        for page in reversed(pages):
            assert self._ref_counts[page] > 0, f"page {page} has no reference"
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
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

    def match_prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest registered prefix, each with one more reference."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._idle.pop(page, None)
            self._ref_counts[page] += 1
            pages.append(page)
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """Makes a full page that is held known by its digest. Of several pages with one digest the first is kept."""
        assert self._ref_counts[page] > 0
        if page not in self._digest_of and digest not in self._page_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def unregister(self, pages: Sequence[int]) -> None:
        """Removes the digests of pages that are held, so that no other sequence finds their content."""
        for page in pages:
            if page in self._digest_of:
                del self._page_of[self._digest_of.pop(page)]

    def unregister_all(self) -> None:
        """Removes every digest, so that nothing computed so far is reused; references stay."""
        for page in self._idle:
            heapq.heappush(self._free, page)
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Asserts that each page is free, idle, or held by exactly the sequences whose pages `held` lists."""
        counts = [0] * (self.first + self.n_pages)
        for pages in held:
            assert len(set(pages)) == len(pages), "one sequence has a page twice"
            for page in pages:
                counts[page] += 1
        assert counts == self._ref_counts, "references miscounted"
        idle, free = set(self._idle), set(self._free)
        assert len(free) == len(self._free) and not free & idle, "a page is free twice"
        unheld = {p for p in range(self.first, self.first + self.n_pages) if counts[p] == 0}
        assert free | idle == unheld, "a page is lost, or free and held"
        known = set(self._digest_of)
        assert idle <= known and not free & known, "an idle page without digest, or a free one with"
        assert {d: p for p, d in self._digest_of.items()} == self._page_of, "digests out of step"
