"""Decides which tokens run next. Plain Python, no tensors: every rank holds the same state and decides the same."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from core.batch import DECODE_ROWS, SequenceSlice
from core.run_config import RunConfig
from engine.pages import PagePool


@dataclass(eq=False)
class Sequence:
    """One request as the scheduler sees it: `tokens` grows; the latents of the first `n_cached` lie in `pages`."""

    id: int
    tokens: list[int]
    capacity: int  # the most tokens it may have, prompt and answer
    n_prompt: int = 0
    no_prefix_reuse: bool = False  # every prompt token must be run, because its log-probability is asked for
    n_scored: int = 0  # prompt tokens whose log-probabilities are known
    n_cached: int = 0
    n_reused: int = 0  # cached tokens found in other sequences' pages when it was last admitted
    pages: list[int] = field(default_factory=list)
    n_registered: int = 0  # of its pages, how many the pool knows by digest
    digests: list[bytes] = field(default_factory=list)  # of its full pages
    drafts: list[int] = field(default_factory=list)  # proposed tokens, to be verified in the next step
    microbatch: int = 0  # the number of its microbatch, in a pipeline

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def decoding(self) -> bool:
        """Only its last token is not cached yet."""
        return len(self.tokens) - self.n_cached == 1


class Chunk:
    """What one step runs of a sequence: `n` tokens from position `start` on and, behind its last token, its drafts."""

    __slots__ = ("drafts", "n", "n_rows", "samples", "sequence", "start")

    def __init__(self, sequence: Sequence, start: int, n: int, drafts: tuple[int, ...] = ()):
        self.sequence, self.start, self.n, self.drafts = sequence, start, n, drafts
        self.n_rows = n + len(drafts)  # of the step's batch
        self.samples = start + n == len(sequence.tokens)  # it ends with the last token: the next one is sampled

    @property
    def slice(self) -> SequenceSlice:
        """What `Batch.pack` takes. Valid until the step is committed."""
        tokens = self.sequence.tokens[self.start : self.start + self.n]
        return tokens + list(self.drafts) if self.drafts else tokens, self.start, self.sequence.pages


class Scheduler:
    """First come, first served, with pages allocated as they are needed.

    Each step runs every decoding sequence and fills the token budget with chunks of prompts; while sequences decode,
    max_num_mixed_tokens may hold these chunks to fewer tokens, so that answers do not stall. When pages run out, the
    youngest sequence is preempted: it releases its pages, returns to the head of the queue and is later recomputed from
    its tokens. The oldest is never preempted for a younger one, so every sequence finishes.
    """

    def __init__(self, pool: PagePool, run: RunConfig):
        self.pool, self.max_num_seqs, self.max_num_batched_tokens = pool, run.max_num_seqs, run.max_step_tokens
        self.n_drafts, self.prefix_reuse = run.mtp, run.prefix_reuse
        mixed = self.max_num_batched_tokens if run.max_num_mixed_tokens is None else run.max_num_mixed_tokens
        self.max_num_mixed_tokens = max(mixed, 1 + run.mtp)  # a token and its drafts always run
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.preemptions = 0
        self._preempted: list[Sequence] = []  # in this step

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.pool.page_size)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; its capacity and drafts must fit the pool, or it could never finish."""
        assert 0 < sequence.n_tokens <= sequence.capacity
        assert self.pages_for(sequence.capacity + self.n_drafts) <= self.pool.n_pages
        self.waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, of at most max_num_batched_tokens tokens, in the order that `Batch.pack` wants; empty
        when there is nothing to do."""
        budget = self.max_num_batched_tokens
        chunks: list[Chunk] = []
        many: list[Chunk] = []  # those of more than DECODE_ROWS, which come last
        self._preempted = []
        for sequence in list(self.running):
            n_cached = sequence.n_cached
            if len(sequence.tokens) - n_cached != 1 or sequence in self._preempted:  # it is not decoding
                continue
            drafts = self._drafts(sequence) if sequence.drafts else ()
            if self._reserve(sequence, n_cached + 1 + len(drafts)):
                chunks.append(Chunk(sequence, n_cached, 1, drafts))
                budget -= 1 + len(drafts)
        if chunks:
            budget = min(budget, self.max_num_mixed_tokens)
        for sequence in self._prefills():
            drafts, n = self._drafts(sequence), sequence.n_tokens - sequence.n_cached
            if n + len(drafts) > budget:  # after a preemption, drafts run together with the last token, as before it
                n, drafts = min(n - bool(drafts), budget), ()
            if n <= 0:
                break
            if sequence not in self._preempted and self._reserve(sequence, sequence.n_cached + n + len(drafts)):
                chunk = Chunk(sequence, sequence.n_cached, n, drafts)
                (chunks if chunk.n_rows <= DECODE_ROWS else many).append(chunk)
                budget -= n + len(drafts)
        chunks += many
        return [c for c in chunks if c.sequence not in self._preempted] if self._preempted else chunks

    def _drafts(self, sequence: Sequence) -> tuple[int, ...]:
        """As many of the sequence's drafts as leave room for the one token that each step is sure to give."""
        return tuple(sequence.drafts[: max(0, sequence.capacity - sequence.n_tokens - 1)])

    def _prefills(self) -> Iterator[Sequence]:
        """Sequences with more than one token to cache: running ones, then those that can be admitted."""
        yield from [sequence for sequence in self.running if not sequence.decoding]
        while self.waiting and len(self.running) < self.max_num_seqs:
            if self.waiting[0] in self._preempted or not self._admit(self.waiting[0]):
                break
            self.running.append(self.waiting.popleft())
            yield self.running[-1]

    def _admit(self, sequence: Sequence) -> bool:
        """Matches the sequence's prefix with cached pages; False if the pages available do not hold the rest."""
        found: list[int] = []
        if self.prefix_reuse and not sequence.no_prefix_reuse:
            sequence.digests = self.pool.digests(sequence.tokens, sequence.digests)
            most = (sequence.n_tokens - 1) // self.pool.page_size  # at least one token must run
            found = self.pool.match_prefix(sequence.digests[:most])
        missing = self.pages_for(sequence.n_tokens + self.n_drafts) - len(found)
        if missing > self.pool.n_available:
            self.pool.release(found)
            return False
        sequence.pages, sequence.n_registered = found, len(found)
        sequence.n_cached = sequence.n_reused = len(found) * self.pool.page_size
        return True

    def _reserve(self, sequence: Sequence, n_tokens: int) -> bool:
        """Allocates pages for n_tokens and the drafts that may follow, preempting the youngest running sequence as
        often as needed; False if that is the sequence itself."""
        while n_tokens + self.n_drafts > len(sequence.pages) * self.pool.page_size:
            pages = self.pool.allocate(self.pages_for(n_tokens + self.n_drafts) - len(sequence.pages))
            if pages is not None:
                sequence.pages += pages
                continue
            youngest = self.running.pop()
            self._release_pages(youngest)
            self.waiting.appendleft(youngest)
            self._preempted.append(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return False
        return True

    def _release_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.n_cached, sequence.n_registered = [], 0, 0

    def commit(self, chunk: Chunk, tokens: list[int]) -> None:
        """After a step: the chunk's tokens are cached, and `tokens` follow. All but the last of these were drafts in
        the same forward, so they are cached too. Pages filled by this are registered for reuse.

        A chunk that samples and gets no token has failed: nothing it computed may be found by another sequence.
        """
        sequence, page_size = chunk.sequence, self.pool.page_size
        failed = chunk.samples and not tokens
        if failed:
            self.pool.unregister(sequence.pages)  # those of earlier chunks too
        if chunk.samples:  # a sequence recomputed in several chunks keeps its drafts for the last
            sequence.drafts = []
        sequence.tokens += tokens
        sequence.n_cached += chunk.n + max(len(tokens) - 1, 0)
        full = sequence.n_cached // page_size
        if self.prefix_reuse and not (sequence.no_prefix_reuse or failed) and sequence.n_registered < full:
            sequence.digests = self.pool.digests(sequence.tokens, sequence.digests)
            for i in range(sequence.n_registered, full):
                self.pool.register(sequence.pages[i], sequence.digests[i])
            sequence.n_registered = full

    def remove(self, sequence: Sequence) -> None:
        """Takes a finished or cancelled sequence out and releases its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release_pages(sequence)
        else:
            self.waiting.remove(sequence)

    def check_integrity(self) -> None:
        assert len(self.running) <= self.max_num_seqs
        assert all(not sequence.pages for sequence in self.waiting)
        self.pool.check_integrity([sequence.pages for sequence in self.running])
