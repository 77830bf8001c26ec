"""Multi-head latent attention in Triton, as reference.mla specifies it.

Two kernels, one for each phase.

- `decode` serves sequences with few query rows: the absorbed form over paged latents. All heads and all query tokens of
  a sequence share its keys, so they are the rows of one tile. The keys are split over programs; each writes a
  normalised result and the logarithm of its weight, and a second kernel adds them up. The host fixes the number of
  programs, a recorded graph once and for all. The device assigns their work from the lengths, once for all layers, so
  that even a graph recorded for long sequences shares short ones among all programs.
- `prefill` serves sequences with many: the multi-head form. Slabs of latents, as large as a bounded workspace, are
  gathered from their pages and expanded to keys and values by plain matrix products. A flash kernel attends to one slab
  after the other and carries its result along.

Neither reads from the device: the host knows bounds on sequences, rows and keys (core.batch.BatchBounds).

Names: T, N, C, R, P, dn, dv as in model.py. *_PAD is the power of two that a tile's side is padded to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from core.batch import Batch, BatchBounds
from core.config import BLOCK_SIZE
from ops.gpu.casts import INTERPRETED, SCALE_BLOCK, cast, dot_operand, widen_e4m3
from ops.gpu.device import architecture, converts_fp8
from ops.gpu.tiles import tile_for

ByRows = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]
SEQUENCES = tl.constexpr(128)  # whose lengths plan_splits_kernel reads at a time
LOG2_E = math.log2(math.e)  # the kernels' exponentials are powers of two


@triton.jit
def load_latents(
    latents_ptr, scales_ptr, k_pe_ptr, row, inside,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Rows of the pool as operands of a product, c_kv (rows, C_PAD) and k_pe (rows, R_PAD); zeros where not `inside`.

    With scales_ptr the rows are reference.pack_latents' bytes, of which the three pointers see values, scales and
    rotary keys, each in its own type.
    """
    GROUPS: tl.constexpr = (C + SCALE_BLOCK - 1) // SCALE_BLOCK
    PACKED: tl.constexpr = scales_ptr is not None
    WIDTH: tl.constexpr = C + 4 * GROUPS + 2 * R if PACKED else C + R
    PE_WIDTH: tl.constexpr = WIDTH // 2 if PACKED else WIDTH
    c, r = tl.arange(0, C_PAD)[None, :], tl.arange(0, R_PAD)[None, :]
    c_kv = tl.load(latents_ptr + row[:, None] * WIDTH + c, mask=inside[:, None] & (c < C), other=0.0)
    if PACKED:
        PARTS: tl.constexpr = C_PAD // SCALE_BLOCK if C_PAD > SCALE_BLOCK else 1
        g = tl.arange(0, PARTS)[None, :]
        s = tl.load(scales_ptr + row[:, None] * (WIDTH // 4) + g, mask=inside[:, None] & (g < GROUPS), other=0.0)
        c_kv = widen_e4m3(c_kv) if c_kv.dtype == tl.uint8 else c_kv.to(tl.float32)
        scaled = c_kv.reshape(row.shape[0], PARTS, C_PAD // PARTS) * s[:, :, None]
        c_kv = scaled.reshape(row.shape[0], C_PAD)
    k_pe = tl.load(k_pe_ptr + row[:, None] * PE_WIDTH + r, mask=inside[:, None] & (r < R), other=0.0)
    return dot_operand(c_kv, False), dot_operand(k_pe, False)


# --------------------------------------------------------------------------------------------------------------------
# Few query rows
# --------------------------------------------------------------------------------------------------------------------


@triton.jit
def count_work(lengths_ptr, bounds_ptr, at, B, first, last, N, ROWS, PAGE):
    """Pages, and tiles of rows in [first, last), of each of the SEQUENCES sequences from `at` on; 0 from B on."""
    b = at + tl.arange(0, SEQUENCES)
    begin = tl.maximum(tl.load(bounds_ptr + b, mask=b < B, other=0), first)
    stop = tl.minimum(tl.load(bounds_ptr + b + 1, mask=b < B, other=0), last)
    pages = tl.cdiv(tl.load(lengths_ptr + b, mask=b < B, other=0), PAGE)
    return pages, tl.cdiv(tl.maximum(stop - begin, 0) * N, ROWS)


@triton.jit(
    do_not_specialize=[
        "lengths_ptr", "bounds_ptr", "n_programs", "first", "last", "fixed_pages", "PROGRAMS", "N", "ROWS", "PAGE"
    ]
)  # fmt: skip
def plan_splits_kernel(
    lengths_ptr, bounds_ptr, plan_ptr, n_programs, first, last, fixed_pages, PROGRAMS, N, ROWS, PAGE
):
    """One program per sequence plans decode's programs for it, a row of 6 numbers to each (n_programs, 6): the sequence
    (-1: nothing is left), its tokens' begin and end among [first, last), the tile of their rows, the first of its keys
    and the keys of a split.

    Decode's programs are numbered by sequence, split and tile. A split has fixed_pages; or, where that is 0, so many
    as would share all pages, each counted once for every tile, evenly among PROGRAMS, and a sequence's splits are then
    made of one size. As every tile rounds up once, there are never more than PROGRAMS and the tiles.
    """
    sequence, B = tl.program_id(0), tl.num_programs(0)
    most = fixed_pages
    if fixed_pages == 0:
        total = 0
        for at in range(0, B, SEQUENCES):
            pages, tiles = count_work(lengths_ptr, bounds_ptr, at, B, first, last, N, ROWS, PAGE)
            total += tl.sum(pages * tiles)
        most = tl.maximum(tl.cdiv(total, PROGRAMS), 1)
    start = 0
    for at in range(0, sequence, SEQUENCES):
        pages, tiles = count_work(lengths_ptr, bounds_ptr, at, sequence, first, last, N, ROWS, PAGE)
        start += tl.sum(tl.cdiv(pages, most) * tiles)

    begin = tl.maximum(tl.load(bounds_ptr + sequence), first)
    stop = tl.minimum(tl.load(bounds_ptr + sequence + 1), last)
    its_tiles = tl.cdiv(tl.maximum(stop - begin, 0) * N, ROWS)
    its_pages = tl.cdiv(tl.load(lengths_ptr + sequence), PAGE)
    splits = tl.cdiv(its_pages, most)
    keys = (tl.cdiv(its_pages, splits) if fixed_pages == 0 else most) * PAGE
    end = start + splits * its_tiles
    for at in range(start, end, SEQUENCES):
        program = at + tl.arange(0, SEQUENCES)
        ptrs, inside = plan_ptr + 6 * program, program < end
        tl.store(ptrs, sequence, mask=inside)
        tl.store(ptrs + 1, begin, mask=inside)
        tl.store(ptrs + 2, stop, mask=inside)
        tl.store(ptrs + 3, (program - start) % its_tiles, mask=inside)
        tl.store(ptrs + 4, (program - start) // its_tiles * keys, mask=inside)
        tl.store(ptrs + 5, keys, mask=inside)
    if sequence == B - 1:
        for at in range(end, n_programs, SEQUENCES):
            program = at + tl.arange(0, SEQUENCES)
            tl.store(plan_ptr + 6 * program, -1, mask=program < n_programs)


@triton.jit(do_not_specialize=["pages_ptr", "positions_ptr", "P", "first", "width"])
def decode_kernel(
    q_ptr, q_pe_ptr, latents_ptr, scales_ptr, k_pe_ptr, pages_ptr, positions_ptr, plan_ptr, out_ptr, lse_ptr,
    splits_ptr, P, first, width, scale,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS of one sequence's (query token, head) rows against one split of its keys, as plan_splits_kernel says.

    q (T, N, C) absorbed, q_pe (T, N, R). out (programs, width, C) is the result, normalised, lse (programs, width) the
    binary logarithm of what it was divided by, which are this row's weights' sum; no tile has more than `width` rows.
    splits (tokens from `first` on, N, 3) says for each row where in lse its first split is, how far on the next, and
    how many keys a split has. `scale` includes log2(e). With SWAP all tiles are transposed.
    """
    program = tl.program_id(0)
    plan_ptr += 6 * program
    sequence = tl.load(plan_ptr)
    if sequence < 0:
        return
    begin, stop, tile = tl.load(plan_ptr + 1), tl.load(plan_ptr + 2), tl.load(plan_ptr + 3)
    low, keys = tl.load(plan_ptr + 4), tl.load(plan_ptr + 5)
    row = tile * ROWS + tl.arange(0, ROWS)
    real = row < (stop - begin) * N
    token = begin + row // N
    position = tl.load(positions_ptr + token, mask=real, other=-1).to(tl.int32)
    high = tl.minimum(low + keys, tl.max(position) + 1)
    if low >= high:
        return

    if low == 0:
        said = splits_ptr + 3 * ((token - first) * N + row % N)
        tl.store(said, program * width + tl.arange(0, ROWS), mask=real)
        tl.store(said + 1, tl.zeros_like(row) + tl.cdiv((stop - begin) * N, ROWS) * width, mask=real)
        tl.store(said + 2, tl.zeros_like(row) + keys, mask=real)
    index = token.to(tl.int64) * N + row % N
    c, r = tl.arange(0, C_PAD)[None, :], tl.arange(0, R_PAD)[None, :]
    q = tl.load(q_ptr + index[:, None] * C + c, mask=real[:, None] & (c < C), other=0.0)
    q_pe = tl.load(q_pe_ptr + index[:, None] * R + r, mask=real[:, None] & (r < R), other=0.0)
    q, q_pe = dot_operand(q, False), dot_operand(q_pe, False)
    axis: tl.constexpr = 0 if SWAP else 1  # along which the keys lie
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((C_PAD, ROWS) if SWAP else (ROWS, C_PAD), tl.float32)
    pages_ptr += sequence.to(tl.int64) * P
    for at in tl.range(low, high, KEYS, num_stages=STAGES):
        key = at + tl.arange(0, KEYS)
        place = tl.load(pages_ptr + at // PAGE).to(tl.int64) * PAGE + key % PAGE
        c_kv, k_pe = load_latents(latents_ptr, scales_ptr, k_pe_ptr, place, key < high, C, R, C_PAD, R_PAD)
        if SWAP:
            scores = tl.dot(k_pe, q_pe.T, tl.dot(c_kv, q.T))  # (KEYS, ROWS)
        else:
            scores = tl.dot(q_pe, k_pe.T, tl.dot(q, c_kv.T))
        seen = tl.expand_dims(key, 1 - axis) <= tl.expand_dims(position, axis)
        scores = tl.where(seen, scores * scale, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, axis))
        shift = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen no key yet
        p = tl.exp2(scores - tl.expand_dims(shift, axis))
        kept = tl.exp2(best - shift)
        total = total * kept + tl.sum(p, axis)
        p = dot_operand(p, False)
        acc *= tl.expand_dims(kept, axis)
        acc = tl.dot(c_kv.T, p, acc) if SWAP else tl.dot(p, c_kv, acc)
        best = peak

    place = program.to(tl.int64) * width + tl.arange(0, ROWS)
    total = tl.where(total == 0, 1.0, total)  # a row that saw none, whose result nobody will ask for
    tl.store(lse_ptr + place, best + tl.log2(total), mask=real)
    out = acc * tl.expand_dims(1.0 / total, axis)
    tl.store(out_ptr + place[:, None] * C + c, out.T if SWAP else out, mask=real[:, None] & (c < C))


@triton.jit(do_not_specialize=["positions_ptr", "first"])
def combine_splits_kernel(
    partial_ptr, lse_ptr, splits_ptr, positions_ptr, out_ptr, first,
    N: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one row's splits (see decode_kernel), those that hold a key it sees, added up SPLITS at a time."""
    row = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    splits_ptr += 3 * row
    start, stride = tl.load(splits_ptr), tl.load(splits_ptr + 1)
    n = tl.load(positions_ptr + first + row // N).to(tl.int32) // tl.load(splits_ptr + 2) + 1
    best = tl.full((SPLITS,), float("-inf"), tl.float32)
    for at in range(0, n, SPLITS):
        split = at + tl.arange(0, SPLITS)
        best = tl.maximum(best, tl.load(lse_ptr + start + split * stride, mask=split < n, other=float("-inf")))
    peak = tl.max(best)
    total = tl.zeros((SPLITS,), tl.float32)
    acc = tl.zeros((SPLITS, COLUMNS), tl.float32)
    for at in tl.range(0, n, SPLITS, num_stages=2):
        split = at + tl.arange(0, SPLITS)
        place = (start + split * stride).to(tl.int64)
        weight = tl.exp2(tl.load(lse_ptr + place, mask=split < n, other=float("-inf")) - peak)
        inside = (split < n)[:, None] & (c < C)[None, :]
        acc += weight[:, None] * tl.load(partial_ptr + place[:, None] * C + c[None, :], mask=inside, other=0.0)
        total += weight
    out_ptrs = out_ptr + (first.to(tl.int64) * N + row) * C + c
    tl.store(out_ptrs, cast(tl.sum(acc, 0) / tl.sum(total), out_ptr.dtype.element_ty), mask=c < C)


# --------------------------------------------------------------------------------------------------------------------
# Many query rows
# --------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pages_ptr", "lengths_ptr", "P", "slab", "n_slab"])
def gather_kernel(
    latents_ptr, scales_ptr, k_pe_in_ptr, pages_ptr, lengths_ptr, ends_ptr, c_kv_ptr, k_pe_ptr, P, slab, n_slab,
    C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """KEYS latents of one sequence out of their page, to c_kv (n_slab, C) and k_pe (n_slab, R), unpacked.

    All sequences' keys, one after the other, are one row of numbers, where sequence b ends at ends[b]; of it only
    [slab, slab + n_slab) is wanted.
    """
    at, sequence = tl.program_id(0) * KEYS, tl.program_id(1)
    length = tl.load(lengths_ptr + sequence)
    key = at + tl.arange(0, KEYS)
    to = tl.load(ends_ptr + sequence) - length - slab + key  # where in the slab it goes
    wanted = (key < length) & (to >= 0) & (to < n_slab)
    if tl.max(wanted.to(tl.int32)) == 0:
        return
    place = tl.load(pages_ptr + sequence.to(tl.int64) * P + at // PAGE).to(tl.int64) * PAGE + key % PAGE
    c_kv, k_pe = load_latents(latents_ptr, scales_ptr, k_pe_in_ptr, place, wanted, C, R, C_PAD, R_PAD)
    to = to.to(tl.int64)[:, None]
    c, r = tl.arange(0, C_PAD)[None, :], tl.arange(0, R_PAD)[None, :]
    c_kv, k_pe = cast(c_kv, c_kv_ptr.dtype.element_ty), cast(k_pe, k_pe_ptr.dtype.element_ty)
    tl.store(c_kv_ptr + to * C + c, c_kv, mask=wanted[:, None] & (c < C))
    tl.store(k_pe_ptr + to * R + r, k_pe, mask=wanted[:, None] & (r < R))


@triton.jit
def attend(
    q, q_pe, acc, best, total, position, k_ptr, k_pe_ptr, v_ptr, low, high, scale,
    N: tl.constexpr, DN: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, DN_PAD: tl.constexpr, R_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of query rows over the keys [low, high): (acc, best, total) carried on. Without MASKED every row sees all
    of them, and they are a multiple of KEYS."""
    d, r, e = tl.arange(0, DN_PAD)[None, :], tl.arange(0, R_PAD)[None, :], tl.arange(0, DV_PAD)[None, :]
    for at in tl.range(low, high, KEYS, num_stages=STAGES):
        key = at + tl.arange(0, KEYS)
        row = key.to(tl.int64)[:, None]
        inside = (key < high)[:, None] if MASKED else (key >= 0)[:, None]
        k = tl.load(k_ptr + row * (N * DN) + d, mask=inside & (d < DN), other=0.0)
        k_pe = tl.load(k_pe_ptr + row * R + r, mask=inside & (r < R), other=0.0)
        scores = tl.dot(q, dot_operand(k, False).T)
        scores = tl.dot(q_pe, dot_operand(k_pe, False).T, scores) * scale
        if MASKED:
            last = tl.minimum(position, high - 1)
            scores = tl.where(key[None, :] <= last[:, None], scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, 1))
        shift = tl.where(peak == float("-inf"), 0.0, peak) if MASKED else peak
        p = tl.exp2(scores - shift[:, None])
        kept = tl.exp2(best - shift)
        total = total * kept + tl.sum(p, 1)
        v = tl.load(v_ptr + row * (N * DV) + e, mask=inside & (e < DV), other=0.0)
        acc = tl.dot(dot_operand(p, False), dot_operand(v, False), acc * kept[:, None])
        best = peak
    return acc, best, total


@triton.jit(do_not_specialize=["positions_ptr", "bounds_ptr", "lengths_ptr", "slab", "n_slab"])
def prefill_kernel(
    q_ptr, q_pe_ptr, k_ptr, k_pe_ptr, v_ptr, positions_ptr, bounds_ptr, lengths_ptr, ends_ptr, out_ptr, state_ptr,
    lse_ptr, slab, n_slab, scale,
    N: tl.constexpr, DN: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, DN_PAD: tl.constexpr, R_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS query tokens of one sequence and head over that part of their keys which lies in a slab (gather_kernel).

    q (T, N, dn) with strides Q_TOKEN and Q_HEAD, q_pe (T, N, R), k (n_slab, N, dn), k_pe (n_slab, R), v (n_slab, N,
    dv), out (T, N, dv). A row that has keys in slabs to come leaves its result so far, normalised, in state (T, N, dv)
    and its weight's binary logarithm in lse (T, N), both float32, and goes on from there in the next. `scale`
    includes log2(e).
    """
    tile, head, sequence = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, stop = tl.load(bounds_ptr + sequence), tl.load(bounds_ptr + sequence + 1)
    begin += tile * ROWS  # the last rows, which take longest, come first
    if begin >= stop:
        return
    token = begin + tl.arange(0, ROWS)
    real = token < stop
    position = tl.load(positions_ptr + token, mask=real, other=-1).to(tl.int32)
    offset = tl.load(ends_ptr + sequence) - tl.load(lengths_ptr + sequence) - slab  # of its first key in the slab
    end = tl.max(position) + 1
    low, high = tl.maximum(-offset, 0), tl.minimum(end, n_slab - offset)
    if low >= high:
        return

    index = token.to(tl.int64)
    d, r, e = tl.arange(0, DN_PAD)[None, :], tl.arange(0, R_PAD)[None, :], tl.arange(0, DV_PAD)[None, :]
    q_ptrs = q_ptr + index[:, None] * Q_TOKEN + head * Q_HEAD + d
    q = dot_operand(tl.load(q_ptrs, mask=real[:, None] & (d < DN), other=0.0), False)
    index = index * N + head
    q_pe = dot_operand(tl.load(q_pe_ptr + index[:, None] * R + r, mask=real[:, None] & (r < R), other=0.0), False)
    known = token < tl.where(low > 0, stop, 0)
    acc = tl.load(state_ptr + index[:, None] * DV + e, mask=known[:, None] & (e < DV), other=0.0)
    best = tl.load(lse_ptr + index, mask=known, other=float("-inf"))
    total = tl.where(known, 1.0, 0.0)

    offset = offset.to(tl.int64)
    k_ptr += offset * (N * DN) + head * DN
    k_pe_ptr += offset * R
    v_ptr += offset * (N * DV) + head * DV
    seen_by_all = tl.minimum(tl.load(positions_ptr + begin).to(tl.int32) + 1, high)
    middle = low + tl.maximum(seen_by_all - low, 0) // KEYS * KEYS
    acc, best, total = attend(
        q, q_pe, acc, best, total, position, k_ptr, k_pe_ptr, v_ptr, low, middle, scale,
        N, DN, R, DV, DN_PAD, R_PAD, DV_PAD, KEYS, False, STAGES,
    )  # fmt: skip
    acc, best, total = attend(
        q, q_pe, acc, best, total, position, k_ptr, k_pe_ptr, v_ptr, middle, high, scale,
        N, DN, R, DV, DN_PAD, R_PAD, DV_PAD, KEYS, True, STAGES,
    )  # fmt: skip

    total = tl.where(total == 0, 1.0, total)  # rows past the end
    acc *= (1.0 / total)[:, None]
    inside = real[:, None] & (e < DV)
    if high == end:
        tl.store(out_ptr + index[:, None] * DV + e, cast(acc, out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(state_ptr + index[:, None] * DV + e, acc, mask=inside)
        tl.store(lse_ptr + index, best + tl.log2(total), mask=real)


# --------------------------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionTile:
    """How a kernel computes: rows and keys of its tile of scores, warps and stages of the pipeline."""

    max_rows: float  # rows a sequence has at most: query tokens x heads for decode, query tokens for prefill
    rows: int
    keys: int
    warps: int
    stages: int
    swap: bool = False

    def constexprs(self) -> dict[str, Any]:
        return {"ROWS": self.rows, "KEYS": self.keys, "STAGES": self.stages}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps}


# Hopper's tensor core wants 64 rows in its first operand: with fewer rows the 64 keys come first. Shared memory holds
# two tiles of keys; a third stage fetches the next page's number ahead, where registers suffice. Latents in FP8 are
# widened in registers, from which Triton feeds a first operand without going back to shared memory, and 64 keys of it
# spill: there the rows come first, few as they may be, filled up to 64. Blackwell keeps two copies of a pipelined tile
# that is used twice, and has no room for them: one stage, and two programs to a multiprocessor; with more than 16 rows
# (32 of FP8 latents) the result spills on its way through the registers.
DECODE = {  # by architecture and whether latents are packed
    ("sm_80", False): (AttentionTile(16, 16, 32, 4, 2), AttentionTile(math.inf, 32, 32, 4, 2)),
    ("sm_80", True): (AttentionTile(math.inf, 16, 32, 8, 2),),
    ("sm_89", False): (AttentionTile(16, 16, 32, 4, 2), AttentionTile(math.inf, 32, 32, 4, 2)),
    ("sm_89", True): (AttentionTile(math.inf, 16, 32, 8, 2),),
    ("sm_90", False): (
        AttentionTile(16, 16, 64, 4, 3, True),
        AttentionTile(32, 32, 64, 4, 2, True),
        AttentionTile(math.inf, 64, 64, 8, 2),
    ),
    ("sm_90", True): (AttentionTile(math.inf, 64, 32, 8, 2),),
    ("sm_100", False): (AttentionTile(math.inf, 16, 64, 8, 1, True),),
    ("sm_100", True): (AttentionTile(16, 16, 64, 8, 1, True), AttentionTile(math.inf, 32, 64, 8, 1, True)),
    ("gfx942", False): (AttentionTile(16, 16, 32, 4, 1), AttentionTile(math.inf, 32, 32, 4, 1)),
    ("gfx942", True): (AttentionTile(math.inf, 32, 16, 4, 1),),
}
# Heads wider than 128 (GigaChat3's values have 192, GLM-4.7-Flash's 256) fill tiles of 256, of which a thread's
# registers hold half as many rows.
PREFILL = {  # by architecture and whether a head's keys or values, without the rotary part, are wider than 128
    ("sm_80", False): (AttentionTile(math.inf, 64, 64, 4, 2),),
    ("sm_80", True): (AttentionTile(math.inf, 64, 32, 8, 2),),
    ("sm_89", False): (AttentionTile(math.inf, 64, 32, 4, 2),),
    ("sm_89", True): (AttentionTile(math.inf, 64, 32, 8, 2),),
    ("sm_90", False): (AttentionTile(math.inf, 128, 64, 8, 3),),
    ("sm_90", True): (AttentionTile(math.inf, 64, 64, 8, 2),),
    ("sm_100", False): (AttentionTile(math.inf, 128, 64, 8, 2),),
    ("sm_100", True): (AttentionTile(math.inf, 64, 64, 8, 2),),
    ("gfx942", False): (AttentionTile(math.inf, 64, 32, 4, 1),),
    ("gfx942", True): (AttentionTile(math.inf, 64, 32, 4, 1),),
}
PROGRAMS = 264  # of decode, which share its pages: two for each multiprocessor of an H200
FIXED_SPLIT = 512  # keys of a split in batch-invariant mode
COLUMNS, SPLITS, COMBINE_WARPS = 128, 32, 4  # of a combine program; SPLITS it adds up at a time
GATHERED, GATHER_WARPS = 64, 8  # keys and warps of a gather program
SPLIT_BYTES = 256 << 20  # the most that the results of splits may take
# The most that keys and values may take that are expanded at one time. A key takes N (dn + dv) values and its latent:
# for the 16 heads of V3 on one rank of eight 2 (16 x 256 + 576) = 9,344 bytes, so that a slab has 114,912 keys, and a
# prompt of 131,072 takes two; with all 128 heads 66,688 bytes, 16,100 keys.
SLAB_BYTES = 1 << 30


def _pad(size: int) -> int:
    """A side of a tile: a power of two, and what a product takes at least."""
    return max(16, triton.next_power_of_2(size))


# --------------------------------------------------------------------------------------------------------------------
# The op
# --------------------------------------------------------------------------------------------------------------------


def mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
    by_rows: ByRows | None = None,
) -> torch.Tensor:
    """As reference.mla, for a batch whose `decode` and `prefill` bounds say what the host knows of it.

    `by_rows(product, x)` multiplies rows in blocks of one size. Given, every sequence goes through the absorbed form,
    with splits and tiles of one size, so that a token's result does not depend on the rest of its batch.
    """
    assert batch.whole.n == len(batch.kv_lens), "the host does not know the batch's bounds"
    few = batch.decode if by_rows is None else batch.whole
    n_heads, dv, c = w_uv.shape
    out = torch.empty(len(q_nope), n_heads, dv, dtype=q_nope.dtype, device=q_nope.device)
    if few.n:
        own = slice(0, few.tokens)
        q = torch.empty(few.tokens, n_heads, c, dtype=q_nope.dtype, device=q_nope.device)
        _per_head(q_nope[own], w_uk, q, by_rows)
        o = decode(q, q_pe[own], latents, batch, few, scale, fixed=by_rows is not None)
        _per_head(o, w_uv.mT, out[own], by_rows)
    if few.n < len(batch.kv_lens):
        prefill(q_nope, q_pe, latents, batch, w_uk, w_uv, scale, out)
    return out


def _per_head(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, by_rows: ByRows | None) -> None:
    """out (T, N, b) = x (T, N, a) by each head's w (N, a, b)."""
    if by_rows is None:
        torch.bmm(x.transpose(0, 1), w, out=out.transpose(0, 1))
    else:
        out.copy_(by_rows(lambda rows: torch.bmm(rows.transpose(0, 1), w).transpose(0, 1), x))


def decode(
    q: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    batch_bounds: BatchBounds,
    scale: float,
    fixed: bool = False,
    split_keys: int | None = None,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """The first sequences' rows in the latent space: q (T, N, C) absorbed, q_pe (T, N, R) to (T, N, C).

    `batch_bounds` says which they are. With `fixed` splits and tiles depend on the number of heads alone; otherwise
    split_keys, a multiple of the page, and tile are the caller's choice.
    """
    n_tokens, n_heads, c = q.shape
    r, page = q_pe.shape[-1], latents.shape[1]
    packed = latents.dtype == torch.uint8
    longest_rows = math.inf if fixed else batch_bounds.longest_q * n_heads
    tile = tile or tile_for(DECODE[architecture(q.device), packed], longest_rows)
    assert q.is_contiguous() and page % tile.keys == 0 and n_tokens == batch_bounds.tokens
    split_keys = FIXED_SPLIT if fixed else split_keys or 0
    assert split_keys % page == 0
    out = torch.empty(n_tokens, n_heads, c, dtype=q.dtype, device=q.device)

    def programs(tokens: int) -> int:
        return split_programs(batch_bounds, tokens, n_heads, tile.rows, page, split_keys)

    def rows(tokens: int) -> int:
        return min(tile.rows, min(batch_bounds.longest_q, tokens) * n_heads)

    at_once = n_tokens
    while at_once > 1 and programs(at_once) * rows(at_once) * c * 4 > SPLIT_BYTES:
        at_once = triton.cdiv(at_once, 2)
    width = rows(at_once)
    partial = torch.empty(programs(at_once), width, c, dtype=torch.float32, device=q.device)
    lse = torch.empty(programs(at_once), width, dtype=torch.float32, device=q.device)
    splits = torch.empty(at_once, n_heads, 3, dtype=torch.int32, device=q.device)
    for first in range(0, n_tokens, at_once):
        last = min(first + at_once, n_tokens)
        key = batch_bounds, first, last, n_heads, tile.rows, split_keys
        if key not in batch.memo:
            batch.memo[key] = torch.empty(programs(last - first), 6, dtype=torch.int32, device=q.device)
            plan_splits_kernel[(batch_bounds.n,)](
                batch.kv_lens, batch.cu_seqlens_q, batch.memo[key], programs(last - first), first, last,
                split_keys // page, PROGRAMS, n_heads, tile.rows, page, num_warps=1,
            )  # fmt: skip
        decode_kernel[(programs(last - first),)](
            q, q_pe.contiguous(), *_pool(latents, c), batch.pages, batch.positions, batch.memo[key], partial, lse,
            splits, batch.pages.stride(0), first, width, scale * LOG2_E,
            N=n_heads, C=c, R=r, C_PAD=_pad(c), R_PAD=_pad(r), PAGE=page, SWAP=tile.swap,
            **tile.constexprs(), **tile.options(),
        )  # fmt: skip
        combine_splits_kernel[((last - first) * n_heads, triton.cdiv(c, COLUMNS))](
            partial, lse, splits, batch.positions, out, first,
            N=n_heads, C=c, COLUMNS=COLUMNS, SPLITS=SPLITS, num_warps=COMBINE_WARPS,
        )  # fmt: skip
    return out


def split_programs(batch_bounds: BatchBounds, tokens: int, n_heads: int, rows: int, page: int, split_keys: int) -> int:
    """How many programs plan_splits_kernel numbers at most for so many tokens, in tiles of `rows`; split_keys 0: by its
    rule. It depends on what the host knows beforehand, and little on the lengths allowed."""
    sequences = min(batch_bounds.n, tokens)
    most_tiles = triton.cdiv(min(batch_bounds.longest_q, tokens) * n_heads, rows)  # of one sequence
    tiles = min(sequences * most_tiles, sequences + tokens * n_heads // rows)
    programs = tiles * triton.cdiv(batch_bounds.longest_kv, split_keys or page)
    if split_keys:
        return min(programs, most_tiles * (batch_bounds.total_kv // split_keys + sequences))
    return min(programs, tiles + PROGRAMS)


def prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    tile: AttentionTile | None = None,
) -> None:
    """The sequences of batch.prefill in the multi-head form, into their rows of out (T, N, dv)."""
    batch_bounds, skip = batch.prefill, batch.decode.n
    (n_heads, dn, c), dv, r = w_uk.shape, w_uv.shape[1], q_pe.shape[-1]
    page = latents.shape[1]
    assert page % GATHERED == 0
    tile = tile or tile_for(PREFILL[architecture(q_nope.device), max(dn, dv) > 128], batch_bounds.longest_q)
    per_key = (n_heads * (dn + dv) + c + r) * q_nope.itemsize
    n_slab = min(max(page, SLAB_BYTES // per_key), batch_bounds.total_kv)
    lengths, pages, bounds = batch.kv_lens[skip:], batch.pages[skip:], batch.cu_seqlens_q[skip:]
    ends = lengths.cumsum(0, dtype=torch.int32)
    widths = c, r, n_heads * dn, n_heads * dv
    c_kv, k_pe, k, v = (torch.empty(n_slab, w, dtype=q_nope.dtype, device=q_nope.device) for w in widths)
    carried = n_slab < batch_bounds.total_kv
    state = torch.empty(out.shape if carried else 0, dtype=torch.float32, device=out.device)
    lse = torch.empty(out.shape[:2] if carried else 0, dtype=torch.float32, device=out.device)
    for slab in range(0, batch_bounds.total_kv, n_slab):
        n = min(n_slab, batch_bounds.total_kv - slab)
        gather_kernel[(triton.cdiv(batch_bounds.longest_kv, GATHERED), batch_bounds.n)](
            *_pool(latents, c), pages, lengths, ends, c_kv, k_pe, pages.stride(0), slab, n,
            C=c, R=r, C_PAD=_pad(c), R_PAD=_pad(r), PAGE=page, KEYS=GATHERED, num_warps=GATHER_WARPS,
        )  # fmt: skip
        torch.mm(c_kv[:n], w_uk.flatten(0, 1).T, out=k[:n])
        torch.mm(c_kv[:n], w_uv.flatten(0, 1).T, out=v[:n])
        prefill_kernel[(triton.cdiv(batch_bounds.longest_q, tile.rows), n_heads, batch_bounds.n)](
            q_nope, q_pe.contiguous(), k, k_pe, v, batch.positions, bounds, lengths, ends, out, state, lse,
            slab, n, scale * LOG2_E,
            N=n_heads, DN=dn, R=r, DV=dv, DN_PAD=_pad(dn), R_PAD=_pad(r), DV_PAD=_pad(dv),
            Q_TOKEN=q_nope.stride(0), Q_HEAD=q_nope.stride(1), **tile.constexprs(), **tile.options(),
        )  # fmt: skip


def _pool(latents: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A layer's latents (n_pages, page, width) as load_latents takes them: compressed values, scales if packed, rotary
    keys."""
    flat = latents.view(-1)
    if latents.dtype != torch.uint8:
        return flat, None, flat[c:]
    after = c + 4 * triton.cdiv(c, BLOCK_SIZE)
    native = converts_fp8(torch.float8_e4m3fn, architecture(latents.device)) and not INTERPRETED.value
    values = flat.view(torch.float8_e4m3fn) if native else flat
    return values, flat.view(torch.float32)[c // 4 :], flat.view(torch.bfloat16)[after // 2 :]
