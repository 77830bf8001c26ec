"""Which tokens run next. Plain Python, no torch: every rank holds the same state and decides the same."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.pages import PagePool


@dataclass(eq=False)
class Job:
    """One request as the scheduler sees it: `tokens` grows, the latents of the first `n_cached` are in `pages`."""

    id: int
    tokens: list[int]
    capacity: int  # most tokens it may come to, prompt and answer
    n_prompt: int = 0
    whole: bool = False  # never reuse pages: something is asked of every prompt token (prompt logprobs)
    n_scored: int = 0  # prompt tokens whose log-probabilities are known
    n_cached: int = 0
    n_reused: int = 0  # of them found in pages of others, when it was last admitted
    pages: list[int] = field(default_factory=list)
    n_learned: int = 0  # of its pages whose digests the pool has been told
    digests: list[bytes] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)  # proposed tokens, to be verified in the next step

    @property
    def n_known(self) -> int:
        return len(self.tokens)

    @property
    def decoding(self) -> bool:
        """Only its last token is not cached yet."""
        return len(self.tokens) - self.n_cached == 1


@dataclass(frozen=True)
class Chunk:
    """What a step runs of one job: its next `n` known tokens, and behind the last of them its drafts."""

    job: Job
    n: int
    drafts: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        return self.job.n_cached

    @property
    def tokens(self) -> list[int]:
        return self.job.tokens[self.start : self.start + self.n] + list(self.drafts)

    @property
    def samples(self) -> bool:
        """Whether it reaches the last known token, so that the next one is sampled."""
        return self.start + self.n == self.job.n_known


class Scheduler:
    """First come, first served, with pages taken as they are needed.

    Each step runs every decoding job and fills the token budget with chunks of prompts; beside decoding jobs these may
    be held to fewer tokens, so that answers do not stall. When pages run out the youngest job gives its own up and goes
    back to the head of the queue, to be resumed from its tokens; the oldest is never preempted for a younger one, so
    everybody finishes.
    """

    def __init__(
        self,
        pool: PagePool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        n_drafts: int = 0,
        reuse: bool = True,
        max_num_mixed_tokens: int | None = None,
    ):
        """`n_drafts`: the most tokens proposed to a job at once; `reuse`: whether jobs share equal beginnings;
        `max_num_mixed_tokens`: prompt tokens of a step in which others decode, if they are to be fewer."""
        assert max_num_batched_tokens >= max_num_seqs * (1 + n_drafts) and max_num_seqs >= 1
        self.pool, self.max_num_seqs, self.max_num_batched_tokens = pool, max_num_seqs, max_num_batched_tokens
        self.n_drafts, self.reuse = n_drafts, reuse
        mixed = max_num_batched_tokens if max_num_mixed_tokens is None else max_num_mixed_tokens
        self.max_num_mixed_tokens = max(mixed, 1 + n_drafts)  # a token and its drafts always go on
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []  # in order of arrival
        self.preemptions = 0
        self._preempted: list[Job] = []  # in this step

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.pool.page_size)

    def add(self, job: Job) -> None:
        """Queues a job; its capacity and drafts must fit the pool, or it could never finish."""
        assert 0 < job.n_known <= job.capacity
        assert self.pages_for(job.capacity + self.n_drafts) <= self.pool.n_pages
        self.waiting.append(job)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, at most max_num_batched_tokens tokens; empty when there is nothing to do."""
        budget = self.max_num_batched_tokens
        chunks: list[Chunk] = []
        self._preempted = []
        for job in list(self.running):
            if not job.decoding or job in self._preempted:
                continue
            drafts = self._drafts(job)
            if self._reserve(job, job.n_known + len(drafts)):
                chunks.append(Chunk(job, 1, drafts))
                budget -= 1 + len(drafts)
        if chunks:
            budget = min(budget, self.max_num_mixed_tokens)
        for job in self._prompts():
            drafts, n = self._drafts(job), job.n_known - job.n_cached
            if n + len(drafts) > budget:  # a resumed job's drafts go with its last token, as if it had not been away
                n, drafts = min(n - bool(drafts), budget), ()
            if n <= 0:
                break
            if job not in self._preempted and self._reserve(job, job.n_cached + n + len(drafts)):
                chunks.append(Chunk(job, n, drafts))
                budget -= n + len(drafts)
        return [c for c in chunks if c.job not in self._preempted]

    def _drafts(self, job: Job) -> tuple[int, ...]:
        """The job's drafts, as many as it may still answer with behind the one token that is sure."""
        return tuple(job.drafts[: max(0, job.capacity - job.n_known - 1)])

    def _prompts(self) -> Iterator[Job]:
        """Jobs with more than one token to cache: running ones, then whoever can be admitted."""
        yield from [job for job in self.running if not job.decoding]
        while self.waiting and len(self.running) < self.max_num_seqs:
            if self.waiting[0] in self._preempted or not self._admit(self.waiting[0]):
                break
            self.running.append(self.waiting.popleft())
            yield self.running[-1]

    def _admit(self, job: Job) -> bool:
        """Finds what is known of the job's tokens, and checks that all the rest has room as things stand now."""
        found: list[int] = []
        if self.reuse and not job.whole:
            job.digests = self.pool.digests(job.tokens, job.digests)
            found = self.pool.find(job.digests[: (job.n_known - 1) // self.pool.page_size])  # one token must be run
        missing = self.pages_for(job.n_known + self.n_drafts) - len(found)
        if missing > self.pool.n_available:
            self.pool.release(found)
            return False
        job.pages, job.n_learned = found, len(found)
        job.n_cached = job.n_reused = len(found) * self.pool.page_size
        return True

    def _reserve(self, job: Job, n_tokens: int) -> bool:
        """Pages for n_tokens and for the drafts that may follow, if need be from the youngest running job; False if
        that is the job itself."""
        while (missing := self.pages_for(n_tokens + self.n_drafts) - len(job.pages)) > 0:
            pages = self.pool.take(missing)
            if pages is not None:
                job.pages += pages
                continue
            youngest = self.running.pop()
            self._give_up_pages(youngest)
            self.waiting.appendleft(youngest)
            self._preempted.append(youngest)
            self.preemptions += 1
            if youngest is job:
                return False
        return True

    def _give_up_pages(self, job: Job) -> None:
        self.pool.release(job.pages)
        job.pages, job.n_cached, job.n_learned = [], 0, 0

    def commit(self, chunk: Chunk, tokens: Sequence[int] = ()) -> None:
        """After a step: the chunk's known tokens are cached, and `tokens` follow them, all but the last of which were
        drafts and so are cached as well. Pages that this fills become known."""
        job, page_size = chunk.job, self.pool.page_size
        failed = chunk.samples and not tokens
        if failed:
            self.pool.forget(job.pages)  # what it computed, in earlier chunks too, is not fit to be found by others
        if chunk.samples:  # a job that is resumed in several chunks keeps its drafts for the last
            job.drafts = []
        job.tokens += tokens
        job.n_cached += chunk.n + max(len(tokens) - 1, 0)
        full = job.n_cached // page_size
        if self.reuse and not (job.whole or failed) and job.n_learned < full:
            job.digests = self.pool.digests(job.tokens[: full * page_size + self.pool.lookahead], job.digests)
            for i in range(job.n_learned, full):
                self.pool.learn(job.pages[i], job.digests[i])
            job.n_learned = full

    def remove(self, job: Job) -> None:
        """Takes a finished or cancelled job out, and its pages back."""
        if job in self.running:
            self.running.remove(job)
            self._give_up_pages(job)
        else:
            self.waiting.remove(job)

    def check_integrity(self) -> None:
        assert len(self.running) <= self.max_num_seqs
        assert all(not job.pages for job in self.waiting)
        self.pool.check_integrity([job.pages for job in self.running])
