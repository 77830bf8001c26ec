"""How decode's programs share the pages of all sequences, and how a row's parts are added up.

As many programs as the GPU runs at one time share the pages of all sequences, laid end to end: each has a run of them,
which may begin in the middle of one sequence and end in another. For each sequence that a run touches, a segment of
the run, it writes a normalised result and the logarithm of its weight; then a row's parts are added up. The host fixes
the number of programs, a recorded graph once and for all. The device plans the runs from the lengths, once for all
layers.

Batch-invariant, every sequence is cut at the same keys instead, whatever is beside it.

Names: T, N, C, P as in model.py.
"""

import triton
import triton.language as tl

from core.batch import BatchBounds
from ops.gpu.casts import cast
from ops.gpu.pdl import wait_for_previous

SEQUENCES = tl.constexpr(128)  # whose lengths plan_runs_kernel reads at a time
NOTHING = tl.constexpr(-1e30)  # the greatest score of a row that has seen no key: finite, so that no difference is NaN
HIDDEN = tl.constexpr(1 << 30)  # the number of a key that no row may see


# --------------------------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def count_work(lengths_ptr, bounds_ptr, at, B, first, last, fixed_pages, N, ROWS, PAGE):
    """Pages, with fixed_pages a multiple of them, and tiles of rows in [first, last), of each of the SEQUENCES
    sequences from `at` on; 0 from B on."""
    b = at + tl.arange(0, SEQUENCES)
    begin = tl.maximum(tl.load(bounds_ptr + b, mask=b < B, other=0), first)
    stop = tl.minimum(tl.load(bounds_ptr + b + 1, mask=b < B, other=0), last)
    unit = tl.maximum(fixed_pages, 1)
    pages = tl.cdiv(tl.cdiv(tl.load(lengths_ptr + b, mask=b < B, other=0), PAGE), unit) * unit
    return pages, tl.cdiv(tl.maximum(stop - begin, 0) * N, ROWS)


@triton.jit
def run_of(place, pages, longer):
    """Which run has the page at a place; the first `longer` runs have one page more than the others."""
    head = longer * (pages + 1)
    return tl.where(place < head, place // (pages + 1), longer + (place - head) // tl.maximum(pages, 1))


@triton.jit(
    do_not_specialize=["lengths_ptr", "bounds_ptr", "n_runs", "first", "last", "fixed_pages", "N", "ROWS", "PAGE"]
)
def plan_runs_kernel(lengths_ptr, bounds_ptr, runs_ptr, segments_ptr, n_runs, first, last, fixed_pages, N, ROWS, PAGE):
    """One program per sequence plans what is done in it: runs (n_runs, 2), the first segment of each and the one behind
    its last, and segments (count_runs, 5), the sequence, which tile of its rows, the first page and the one behind the
    last, and how many segments the tile has.

    The pages of all sequences, for each tile of rows in [first, last), lie end to end. They are shared out evenly; with
    fixed_pages every run has so many of one sequence, at most. A segment's number is its run's and the tiles before it:
    as either grows from one segment to the next, no two have the same, and a tile's follow one another.
    """
    wait_for_previous()
    sequence, B = tl.program_id(0), tl.num_programs(0)
    total, start, tiles_before = 0, 0, 0
    for at in range(0, B, SEQUENCES):
        pages, tiles = count_work(lengths_ptr, bounds_ptr, at, B, first, last, fixed_pages, N, ROWS, PAGE)
        before = at + tl.arange(0, SEQUENCES) < sequence
        total += tl.sum(pages * tiles)
        start += tl.sum(tl.where(before, pages * tiles, 0))
        tiles_before += tl.sum(tl.where(before, tiles, 0))
    each, longer = fixed_pages, 0
    if fixed_pages == 0:
        each, longer = total // n_runs, total % n_runs

    begin = tl.maximum(tl.load(bounds_ptr + sequence), first)
    stop = tl.minimum(tl.load(bounds_ptr + sequence + 1), last)
    own_pages = tl.cdiv(tl.load(lengths_ptr + sequence), PAGE)
    unit = tl.maximum(fixed_pages, 1)
    pages = tl.cdiv(own_pages, unit) * unit
    for tile in range(0, tl.cdiv(tl.maximum(stop - begin, 0) * N, ROWS)):
        first_run, last_run = run_of(start, each, longer), run_of(start + own_pages - 1, each, longer)
        for at in range(first_run, last_run + 1, SEQUENCES):
            run = at + tl.arange(0, SEQUENCES)
            run_begin = run * each + tl.minimum(run, longer)
            run_end = run_begin + each + (run < longer).to(tl.int32)
            low, high = tl.maximum(run_begin, start), tl.minimum(run_end, start + pages)
            segment, inside = run, run <= last_run
            if fixed_pages == 0:
                segment += tiles_before + tile
            row = segments_ptr + 5 * segment
            tl.store(row, sequence, mask=inside)
            tl.store(row + 1, tile, mask=inside)
            tl.store(row + 2, low - start, mask=inside)
            tl.store(row + 3, tl.minimum(high - start, own_pages), mask=inside)
            tl.store(row + 4, last_run - first_run + 1, mask=inside)
            tl.store(runs_ptr + 2 * run, segment, mask=inside & (low == run_begin))
            tl.store(runs_ptr + 2 * run + 1, segment + 1, mask=inside & (high == run_end))
        start += pages
    if sequence == B - 1:
        for at in range(run_of(start - 1, each, longer) + 1, n_runs, SEQUENCES):
            run = at + tl.arange(0, SEQUENCES)
            tl.store(runs_ptr + 2 * run, 0, mask=run < n_runs)
            tl.store(runs_ptr + 2 * run + 1, 0, mask=run < n_runs)


def count_runs(
    batch_bounds: BatchBounds, tokens: int, n_heads: int, rows: int, page: int, programs: int, fixed_pages: int
) -> tuple[int, int]:
    """How many runs plan_runs_kernel plans at most for so many tokens, in tiles of `rows`, and how many segments
    they have at most. Both follow from what the host knows beforehand."""
    lanes = triton.cdiv(n_heads, rows)
    sequences = min(batch_bounds.n, tokens)
    most_tiles = triton.cdiv(min(batch_bounds.longest_q, tokens) * n_heads, rows * lanes)  # of one sequence
    tiles = min(sequences * most_tiles, sequences + tokens * n_heads // (rows * lanes))
    if fixed_pages:
        keys = fixed_pages * page
        parts = tiles * triton.cdiv(batch_bounds.longest_kv, keys)
        parts = min(parts, most_tiles * (batch_bounds.total_kv // keys + sequences))
        return parts, parts
    runs = min(max(programs // lanes, 1), tiles * triton.cdiv(batch_bounds.longest_kv, page))
    return runs, runs + tiles


# --------------------------------------------------------------------------------------------------------------------
# A segment of a run
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def begin_segment(
    segment_ptr, bounds_ptr, positions_ptr, parts_ptr, lse_row, first, last,
    N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The sequence of a segment; of its rows, numbered (token, head), which are real, their numbers and positions; and
    the first of its keys and the one behind the last. The first of a tile's segments also says, for
    combine_parts_kernel, where in lse each row's first part is, and how many parts there are."""
    sequence, tile = tl.load(segment_ptr), tl.load(segment_ptr + 1)
    page, end, n_parts = tl.load(segment_ptr + 2), tl.load(segment_ptr + 3), tl.load(segment_ptr + 4)
    begin = tl.maximum(tl.load(bounds_ptr + sequence), first)
    stop = tl.minimum(tl.load(bounds_ptr + sequence + 1), last)
    row = (tile * LANES + tl.program_id(0) % LANES) * ROWS + tl.arange(0, ROWS)
    real = row < (stop - begin) * N
    token = begin + row // N
    position = tl.load(positions_ptr + token, mask=real, other=-1).to(tl.int32)
    index = token.to(tl.int64) * N + row % N
    if page == 0:
        said = parts_ptr + 2 * (index - first.to(tl.int64) * N)
        tl.store(said, lse_row, mask=real)
        tl.store(said + 1, tl.zeros_like(row) + n_parts, mask=real)
    return sequence, real, index, position, page * PAGE, tl.minimum(end * PAGE, tl.max(position) + 1)


@triton.jit
def join(scores, position, key, best, total, scale, AXIS: tl.constexpr):
    """Scores of some keys, which lie along AXIS, taken into the running softmax: weights p, what earlier weights are
    multiplied by, and (best, total) carried on."""
    seen = tl.expand_dims(key, 1 - AXIS) <= tl.expand_dims(position, AXIS)
    scores = tl.where(seen, scores, float("-inf"))
    peak = tl.maximum(best, tl.max(scores, AXIS) * scale)
    p = tl.exp2(scores * scale - tl.expand_dims(peak, AXIS))
    kept = tl.exp2(best - peak)
    return p, kept, peak, total * kept + tl.sum(p, AXIS)


@triton.jit
def end_segment(lse_ptr, lse_row, real, best, total):
    """Stores the binary logarithm of the weights' sum, and returns what the result is to be multiplied by; a row that
    sees no key of this part weighs nothing."""
    none = total == 0
    total = tl.where(none, 1.0, total)
    tl.store(lse_ptr + lse_row, tl.where(none, float("-inf"), best + tl.log2(total)), mask=real)
    return 1.0 / total


@triton.jit(do_not_specialize=["first", "stride"])
def combine_parts_kernel(
    partial_ptr, lse_ptr, parts_ptr, out_ptr, first, stride,
    N: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one row's parts (see decode_kernel), `stride` rows apart, added up PARTS at a time. One that holds no
    key that the row sees weighs nothing."""
    wait_for_previous()
    row = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, n = tl.load(parts_ptr + 2 * row), tl.load(parts_ptr + 2 * row + 1)
    best = tl.full((PARTS,), float("-inf"), tl.float32)
    for at in range(0, n, PARTS):
        part = at + tl.arange(0, PARTS)
        best = tl.maximum(best, tl.load(lse_ptr + start + part * stride, mask=part < n, other=float("-inf")))
    peak = tl.max(best)
    total = tl.zeros((PARTS,), tl.float32)
    acc = tl.zeros((PARTS, COLUMNS), tl.float32)
    for at in tl.range(0, n, PARTS, num_stages=2):
        part = at + tl.arange(0, PARTS)
        place = (start + part * stride).to(tl.int64)
        weight = tl.exp2(tl.load(lse_ptr + place, mask=part < n, other=float("-inf")) - peak)
        inside = (part < n)[:, None] & (c < C)[None, :]
        acc += weight[:, None] * tl.load(partial_ptr + place[:, None] * C + c[None, :], mask=inside, other=0.0)
        total += weight
    out_ptrs = out_ptr + (first.to(tl.int64) * N + row) * C + c
    tl.store(out_ptrs, cast(tl.sum(acc, 0) / tl.sum(total), out_ptr.dtype.element_ty), mask=c < C)
