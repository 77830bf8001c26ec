"""Scheduler and page pool alone, under random operations, with every invariant checked after each."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.run_config import RunConfig
from engine.pages import PagePool
from engine.scheduler import Scheduler, Sequence

PAGE = 4


def scheduler_of(
    pool: PagePool, sequences: int, budget: int, n_drafts: int = 0, reuse: bool = True, mixed: int | None = None
) -> Scheduler:
    run = RunConfig(
        max_num_seqs=sequences, max_num_batched_tokens=budget, mtp=n_drafts, prefix_reuse=reuse, max_num_mixed_tokens=mixed
    )
    return Scheduler(pool, run)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(0, 30),
    st.integers(0, 3),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 20)),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2)), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)
def test_under_random_use(max_num_seqs, extra, n_drafts, reuse, mixed, wanted, random):
    """Everybody finishes with all tokens in bounded steps; budget and capacity hold; what is read was written.

    `written` plays the tensor: what each slot holds. A sequence may only be sent on with n_cached tokens whose slots hold
    exactly its own tokens, whoever computed them.
    """
    lookahead = int(n_drafts > 0)
    pool = PagePool(16, PAGE, lookahead)
    scheduler = scheduler_of(pool, max_num_seqs, max_num_seqs * (1 + n_drafts) + extra, n_drafts, reuse, mixed)
    written: dict[int, tuple] = {}
    sequences = []
    for i, (n, new, kind) in enumerate(wanted):
        prompt = [kind * 100 + j for j in range(n)]  # three families of prompts that begin alike
        sequences.append(Sequence(i, prompt, min(n + new, 16 * PAGE - n_drafts)))
    left, done, steps = list(sequences), [], 0

    def slot(sequence, p):
        return sequence.pages[p // PAGE] * PAGE + p % PAGE

    while left or scheduler.waiting or scheduler.running:
        while left and random.random() < 0.4:
            scheduler.add(left.pop(0))
        oldest = min((j.id for j in [*scheduler.running, *scheduler.waiting]), default=None)
        answering = {sequence.id for sequence in scheduler.running if sequence.decoding}
        chunks = scheduler.schedule()
        assert sum(len(c.slice[0]) for c in chunks) <= scheduler.max_num_batched_tokens
        if mixed is not None and any(c.sequence.id in answering for c in chunks):
            assert sum(len(c.slice[0]) for c in chunks if c.sequence.id not in answering) <= max(mixed, 1 + n_drafts)
        assert len({c.sequence.id for c in chunks}) == len(chunks)
        assert oldest is None or oldest in {c.sequence.id for c in chunks}, "the oldest waits"
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence in scheduler.running and chunk.slice[0]
            for p in range(chunk.start):
                assert written[slot(sequence, p)] == tuple(sequence.tokens[: p + 1 + lookahead]), "a reused latent is another's"
            last = chunk.start + len(chunk.slice[0]) - 1
            assert last + 1 + n_drafts <= len(sequence.pages) * PAGE, "no room for what the step writes"
        for chunk in chunks:
            sequence, new = chunk.sequence, []
            if chunk.samples:
                taken = random.randint(0, len(chunk.drafts))
                new = [*chunk.drafts[:taken], random.randint(1000, 1003)]
            start, n = chunk.start, chunk.n + max(len(new) - 1, 0)
            after = sequence.tokens + new
            for p in range(start, start + n):
                assert pool._ref_counts[slot(sequence, p) // PAGE] == 1, "a shared page is written to"
                written[slot(sequence, p)] = tuple(after[: p + 1 + lookahead])
            scheduler.commit(chunk, new)
            assert sequence.n_tokens <= sequence.capacity
            if new and (sequence.n_tokens >= sequence.capacity or random.random() < 0.05):
                scheduler.remove(sequence)
                done.append(sequence.id)
            elif new:
                sequence.drafts = [random.randint(1000, 1003) for _ in range(n_drafts)]
        if scheduler.waiting and random.random() < 0.05:
            gone = random.choice(scheduler.waiting)
            scheduler.remove(gone)
            done.append(gone.id)
        scheduler.check_integrity()
        steps += 1
        assert steps < 20_000, "starvation"
    assert pool.n_available == 16
    assert sorted(done) == [j.id for j in sequences]


def run(scheduler: Scheduler, sequence: Sequence, n: int) -> None:
    """Runs one sequence alone for n steps, sampling token 7."""
    for _ in range(n):
        for chunk in scheduler.schedule():
            scheduler.commit(chunk, [7] if chunk.samples else [])
    assert sequence in scheduler.running


def test_prompts_beside_answers_come_in_smaller_chunks():
    scheduler = scheduler_of(PagePool(40, PAGE), 3, 50, mixed=8)
    first, second = Sequence(0, list(range(60)), 80), Sequence(1, list(range(100, 120)), 80)
    scheduler.add(first)
    sizes = []
    for step in range(6):
        if step == 2:
            scheduler.add(second)
        chunks = scheduler.schedule()
        sizes.append([(c.sequence.id, c.n) for c in chunks])
        for chunk in chunks:
            scheduler.commit(chunk, [7] if chunk.samples else [])
    alone, beside = [[(0, 50)], [(0, 10)]], [[(0, 1), (1, 8)], [(0, 1), (1, 8)], [(0, 1), (1, 4)], [(0, 1), (1, 1)]]
    assert sizes == alone + beside


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_second_turn_runs_only_what_is_new(lookahead):
    pool = PagePool(10, PAGE, lookahead)
    scheduler = scheduler_of(pool, 2, 100, n_drafts=lookahead)
    first = Sequence(0, list(range(10)), 20)
    scheduler.add(first)
    run(scheduler, first, 3)  # 12 of its 13 tokens are cached
    scheduler.remove(first)
    assert pool.n_available == 10
    second = Sequence(1, [*first.tokens, 50, 51], 20)
    scheduler.add(second)
    [chunk] = scheduler.schedule()
    assert second.n_reused == 12 and chunk.slice[0] == [7, 50, 51]
    other = Sequence(2, [99, *first.tokens[1:]], 20)
    scheduler.add(other)
    assert [c.start for c in scheduler.schedule() if c.sequence is other] == [0], "another first token, yet pages were reused"


def test_lookahead_keeps_pages_apart_that_end_alike():
    """With an MTP module the last latent of a page knows the next token: [0..3] before 4 is not [0..3] before 5."""
    for lookahead, reused in ((0, 4), (1, 0)):
        scheduler = scheduler_of(PagePool(10, PAGE, lookahead), 2, 100)
        first = Sequence(0, [0, 1, 2, 3, 4, 5], 10)
        scheduler.add(first)
        run(scheduler, first, 1)
        second = Sequence(1, [0, 1, 2, 3, 5], 10)
        scheduler.add(second)
        scheduler.schedule()
        assert second.n_reused == reused


def test_a_page_is_known_by_all_that_is_before_it():
    scheduler = scheduler_of(PagePool(10, PAGE), 2, 100)
    first = Sequence(0, [*[1] * PAGE, *[2] * PAGE, 9], 20)
    scheduler.add(first)
    run(scheduler, first, 1)
    second = Sequence(1, [*[2] * PAGE, 9], 20)  # the same tokens as in first's second page, at another place
    scheduler.add(second)
    scheduler.schedule()
    assert second.n_reused == 0


def test_a_released_beginning_outlives_its_end():
    pool = PagePool(4, PAGE)
    pages = pool.allocate(2)
    for page, digest in zip(pages, (b"a", b"b"), strict=True):
        pool.register(page, digest)
    pool.release(pages)
    assert pool.allocate(3) is not None  # the two that are free, and one of those that are known
    assert pool.match_prefix([b"a", b"b"]) == pages[:1]


def test_drafts_take_their_part_of_the_budget():
    """Of a sequence that was preempted with drafts too, whose last tokens are run as a prompt's are."""
    scheduler = scheduler_of(PagePool(16, PAGE), 2, 8, n_drafts=2)
    scheduler.add(Sequence(0, [1] * 4, 16, drafts=[5, 6]))
    scheduler.add(Sequence(1, [2] * 8, 16))
    assert [c.slice[0] for c in scheduler.schedule()] == [[1, 1, 1, 1, 5, 6], [2, 2]]


def test_least_recently_used_pages_go_first():
    pool = PagePool(4, PAGE)
    a, b = pool.allocate(1), pool.allocate(1)
    for pages, digest in ((a, b"a"), (b, b"b")):
        pool.register(pages[0], digest)
        pool.release(pages)
    assert pool.match_prefix([b"a"]) == a
    pool.release(a)  # now b is the older
    assert pool.allocate(3) is not None
    assert pool.match_prefix([b"a"]) == a and pool.match_prefix([b"b"]) == []


def test_the_youngest_is_preempted_and_resumed():
    scheduler = scheduler_of(PagePool(4, PAGE), 2, 100)
    old, young, late = Sequence(0, [1] * 7, 16), Sequence(1, [2] * 6, 16), Sequence(2, [3], 16)
    for sequence in (old, young, late):
        scheduler.add(sequence)
    for _ in range(10):
        for chunk in scheduler.schedule():
            scheduler.commit(chunk, [7] if chunk.samples else [])
        scheduler.check_integrity()
        if old.n_tokens == old.capacity:
            break
    assert scheduler.preemptions == 1 and scheduler.running == [old]
    assert list(scheduler.waiting) == [young, late], "whoever was preempted comes before those that have not begun"
    scheduler.remove(old)
    while young.n_tokens < young.capacity:
        for chunk in scheduler.schedule():
            scheduler.commit(chunk, [7] if chunk.samples else [])
    assert young.tokens == [2] * 6 + [7] * 10


def test_misuse_is_noticed():
    pool = PagePool(3, PAGE)
    pages = pool.allocate(2)
    assert pages == [0, 1] and pool.allocate(2) is None
    pool.release(pages)
    with pytest.raises(AssertionError, match="page 1 has no reference"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="references miscounted"):
        pool.check_integrity([[2]])
