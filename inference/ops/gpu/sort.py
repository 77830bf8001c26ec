"""Assignments of tokens to experts sorted by expert, in Triton, as reference.sort specifies it.

How many rows each expert gets is in device memory, as a table of row tiles, and never read by the host: a grid covers
the longest table possible. Up to ONE_CHUNK assignments take one launch; more take two, of which each reads every
assignment once.

Names: the assignment a = t * K + k is token t's k-th expert.
"""

import torch
import triton
import triton.language as tl

from ops.gpu import pdl
from ops.gpu.device import architecture
from ops.gpu.pdl import wait_for_previous

UNUSED = tl.constexpr(-1)  # the expert of an unused tile


@triton.jit
def local_experts(ids_ptr, a, n, first, N_LOCAL: tl.constexpr):
    """The experts of assignments a, numbered from `first` on; and which of a are below n and of N_LOCAL experts."""
    local = (tl.load(ids_ptr + a, mask=a < n, other=-1) - first).to(tl.int32)
    return local, (a < n) & (local >= 0) & (local < N_LOCAL)


@triton.jit
def find_tile(ids_ptr, n, first, tile, BLOCK_M: tl.constexpr, N_LOCAL: tl.constexpr, CHUNK: tl.constexpr):
    """Row tile `tile` of those that sort_kernel makes, from all n <= CHUNK ids: its expert (N_LOCAL or more: there is
    no such tile), its rows, and their assignments (BLOCK_M,), the last one repeated."""
    BINS: tl.constexpr = triton.next_power_of_2(N_LOCAL)
    bins, a = tl.arange(0, BINS), tl.arange(0, CHUNK)
    local, here = local_experts(ids_ptr, a, n, first, N_LOCAL)
    counts = tl.histogram(tl.where(here, local, 0), BINS, mask=here)
    needed = (counts + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(needed) <= tile).to(tl.int32))
    skipped = (tile - tl.sum(tl.where(bins < expert, needed, 0))) * BLOCK_M  # of its rows, in tiles before this one
    rows = tl.minimum(tl.sum(tl.where(bins == expert, counts, 0)) - skipped, BLOCK_M)
    mine = here & (local == expert)
    place = tl.where(mine, tl.cumsum(mine.to(tl.int32)) - 1 - skipped, -1)
    wanted = tl.minimum(tl.arange(0, BLOCK_M), rows - 1)
    return expert, rows, tl.sum(tl.where(place[None, :] == wanted[:, None], a[None, :], 0), axis=1)


@triton.jit(do_not_specialize=["n", "first", "n_tiles", "block_m"])
def sort_kernel(ids_ptr, order_ptr, tiles_ptr, n, first, n_tiles, block_m, N_LOCAL: tl.constexpr, CHUNK: tl.constexpr):
    """One program per local expert counts all n <= CHUNK assignments, then writes its own in order, and their tiles.

    No atomics, so nothing depends on which program is faster.
    """
    wait_for_previous()
    BINS: tl.constexpr = triton.next_power_of_2(N_LOCAL)
    expert = tl.program_id(0)
    bins, a = tl.arange(0, BINS), tl.arange(0, CHUNK)
    local, here = local_experts(ids_ptr, a, n, first, N_LOCAL)
    counts = tl.histogram(tl.where(here, local, 0), BINS, mask=here)
    needed = (counts + block_m - 1) // block_m
    count = tl.sum(tl.where(bins == expert, counts, 0))
    start = tl.sum(tl.where(bins < expert, counts, 0))
    tile = tl.sum(tl.where(bins < expert, needed, 0))

    if count > 0:
        mine = here & (local == expert)
        tl.store(order_ptr + start + tl.cumsum(mine.to(tl.int32)) - 1, a, mask=mine)
        for done in range(0, count, block_m):
            ptr = tiles_ptr + 3 * (tile + done // block_m)
            tl.store(ptr, expert)
            tl.store(ptr + 1, start + done)
            tl.store(ptr + 2, tl.minimum(count - done, block_m))
    if expert == N_LOCAL - 1:
        for at in range(tl.sum(needed), n_tiles, 128):
            unused = at + tl.arange(0, 128)
            tl.store(tiles_ptr + 3 * unused, UNUSED, mask=unused < n_tiles)


@triton.jit(do_not_specialize=["n", "first"])
def count_kernel(ids_ptr, counts_ptr, n, first, N_LOCAL: tl.constexpr, CHUNK: tl.constexpr):
    """How many of CHUNK assignments each expert has: a row of counts (programs, BINS)."""
    BINS: tl.constexpr = triton.next_power_of_2(N_LOCAL)
    local, here = local_experts(ids_ptr, tl.program_id(0) * CHUNK + tl.arange(0, CHUNK), n, first, N_LOCAL)
    counts = tl.histogram(tl.where(here, local, 0), BINS, mask=here)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["n", "first", "n_tiles", "block_m"])
def place_kernel(
    ids_ptr, counts_ptr, order_ptr, tiles_ptr, n, first, n_tiles, block_m,
    N_LOCAL: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Writes CHUNK assignments where they belong, behind those of their experts in earlier chunks, STEP at a time; and
    of the table of tiles every row that falls to this program."""
    BINS: tl.constexpr = triton.next_power_of_2(N_LOCAL)
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    bins, step = tl.arange(0, BINS), tl.arange(0, STEP)
    counts, before = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    for other in range(chunks):
        its = tl.load(counts_ptr + other * BINS + bins)
        counts += its
        before += tl.where(other < chunk, its, 0)
    starts = tl.cumsum(counts) - counts
    place = starts + before
    for at in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), STEP):
        local, here = local_experts(ids_ptr, at + step, n, first, N_LOCAL)
        mine = ((local[:, None] == bins[None, :]) & here[:, None]).to(tl.int32)  # (STEP, BINS), one in a row
        to = tl.sum(mine * (place[None, :] + tl.cumsum(mine, 0) - 1), 1)
        tl.store(order_ptr + to, at + step, mask=here)
        place += tl.sum(mine, 0)

    needed = (counts + block_m - 1) // block_m
    ends = tl.cumsum(needed)
    for at in range(chunk * STEP, n_tiles, chunks * STEP):
        tile = at + step
        expert = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
        earlier, own = bins[None, :] < expert[:, None], bins[None, :] == expert[:, None]
        done = (tile - tl.sum(tl.where(earlier, needed[None, :], 0), 1)) * block_m
        start = tl.sum(tl.where(own, starts[None, :], 0), 1) + done
        rows = tl.minimum(tl.sum(tl.where(own, counts[None, :], 0), 1) - done, block_m)
        ptrs, used = tiles_ptr + 3 * tile, (tile < n_tiles) & (expert < BINS)
        tl.store(ptrs, tl.where(used, expert, UNUSED), mask=tile < n_tiles)
        tl.store(ptrs + 1, start, mask=used)
        tl.store(ptrs + 2, rows, mask=used)


CHUNKS = (128, 512, 2048)  # assignments that sort_kernel is compiled for
ONE_CHUNK = CHUNKS[-1]
PLACED, STEP, PLACE_WARPS = 512, 32, 16  # assignments to a program of place_kernel, and of them at a time


def max_tiles(n: int, n_local: int, block_m: int) -> int:
    """The most row tiles that n assignments can need: one partial tile for every expert, and full ones."""
    return min(n, n_local) + n // block_m


def sort(ids: torch.Tensor, first: int, n_local: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.sort, but entries without an assignment are not written, except an unused tile's expert, -1."""
    n, device = ids.numel(), ids.device
    order = torch.empty(n, dtype=torch.int32, device=device)
    row_tiles = torch.empty(max_tiles(n, n_local, block_m), 3, dtype=torch.int32, device=device)
    assert ids.is_contiguous()
    sizes = n, first, len(row_tiles), block_m
    if n > ONE_CHUNK:
        chunks = triton.cdiv(n, PLACED)
        counts = torch.empty(chunks, triton.next_power_of_2(n_local), dtype=torch.int32, device=device)
        count_kernel[(chunks,)](ids, counts, n, first, N_LOCAL=n_local, CHUNK=PLACED)
        place_kernel[(chunks,)](
            ids, counts, order, row_tiles, *sizes, N_LOCAL=n_local, CHUNK=PLACED, STEP=STEP, num_warps=PLACE_WARPS
        )
    elif n:
        chunk = next(c for c in CHUNKS if n <= c)
        sort_kernel[(n_local,)](
            ids, order, row_tiles, *sizes, N_LOCAL=n_local, CHUNK=chunk, **pdl.options(architecture(device))
        )
    return order, row_tiles
