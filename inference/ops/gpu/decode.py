"""Attention of sequences with few query rows: the absorbed form over paged latents, in Triton.

All heads and all query tokens of a sequence share its keys, so they are the rows of one tile, or of a few. Programs go
from sequence to sequence (decode_runs.py); where a sequence is shared between several, their results are added up.

Names: T, N, C, R, P as in model.py. *_PAD is the power of two that a tile's side is padded to.
"""

# mypy: disable-error-code="attr-defined"
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from core.batch import Batch, BatchBounds
from core.config import BLOCK_SIZE
from ops.gpu import pdl
from ops.gpu.attention_tiles import DECODE, AttentionTile
from ops.gpu.casts import dot_operand
from ops.gpu.decode_fp8 import decode_fp8_kernel
from ops.gpu.decode_runs import (
    HIDDEN,
    NOTHING,
    begin_segment,
    combine_parts_kernel,
    count_runs,
    end_segment,
    join,
    plan_runs_kernel,
)
from ops.gpu.device import architecture
from ops.gpu.latents import load_latents, padded, page_descriptor, pool
from ops.gpu.pdl import wait_for_previous
from ops.gpu.tiles import SM_COUNT, tile_for

LOG2_E = math.log2(math.e)  # the kernels' exponentials are powers of two
FIXED_SPLIT = 512  # keys of a part in batch-invariant mode
COLUMNS, PARTS, COMBINE_WARPS = 128, 32, 4  # of a combine program; PARTS it adds up at a time
SPLIT_BYTES = 256 << 20  # the most that the parts' results may take


@triton.jit(do_not_specialize=["bounds_ptr", "pages_ptr", "positions_ptr", "P", "first", "last", "width"])
def decode_kernel(
    q_ptr, q_pe_ptr, latents_ptr, scales_ptr, k_pe_ptr, page_rows, bounds_ptr, pages_ptr, positions_ptr,
    runs_ptr, segments_ptr, out_ptr, lse_ptr, parts_ptr, P, first, last, width, scale,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr, R_PAD: tl.constexpr, PAGE: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One of the LANES programs of a run (plan_runs_kernel): ROWS of a tile's (query token, head) rows each.

    q (T, N, C) absorbed, q_pe (T, N, R). out (segments, LANES, width, C) is normalised, and lse (segments, LANES,
    width) the binary logarithm of what it was divided by, the sum of this row's weights; no tile has more than `width`
    rows. parts (tokens from `first` on, N, 2) says for each row where in lse its first part is and how many parts there
    are; the next is LANES * width on. `scale` includes log2(e). With SWAP all tiles are transposed.

    With page_rows, a descriptor of the pool, each step copies a whole page. The last one's rows past the end may hold
    anything, NaN too: there it asks for as many rows before the page's first as there are keys missing, for which the
    copy has zeros, and so for nothing behind the last key.
    """
    wait_for_previous()
    run, lane = tl.program_id(0) // LANES, tl.program_id(0) % LANES
    c, r = tl.arange(0, C_PAD)[None, :], tl.arange(0, R_PAD)[None, :]
    axis: tl.constexpr = 0 if SWAP else 1  # along which the keys lie
    # What every step computes alike must not be taken out of both loops: it would fill the registers.
    for segment in tl.range(tl.load(runs_ptr + 2 * run), tl.load(runs_ptr + 2 * run + 1), disable_licm=True):
        lse_row = (segment * LANES + lane) * width + tl.arange(0, ROWS)
        sequence, real, index, position, low, high = begin_segment(
            segments_ptr + 5 * segment, bounds_ptr, positions_ptr, parts_ptr, lse_row, first, last, N, ROWS, LANES, PAGE
        )
        q = tl.load(q_ptr + index[:, None] * C + c, mask=real[:, None] & (c < C), other=0.0)
        q_pe = tl.load(q_pe_ptr + index[:, None] * R + r, mask=real[:, None] & (r < R), other=0.0)
        q, q_pe = dot_operand(q, False), dot_operand(q_pe, False)
        best = tl.full((ROWS,), NOTHING, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((C_PAD, ROWS) if SWAP else (ROWS, C_PAD), tl.float32)
        own_ptr = pages_ptr + sequence.to(tl.int64) * P
        number = 0
        if page_rows is not None:
            number = tl.load(own_ptr + low // PAGE)
        for at in tl.range(low, high, KEYS, num_stages=STAGES, disable_licm=True):
            if page_rows is not None:
                j = tl.arange(0, PAGE)
                missing = tl.maximum(at + PAGE - high, 0)
                pe_row = number.to(tl.int64) * PAGE + tl.maximum(j - missing, 0)
                k_pe = tl.load(k_pe_ptr + pe_row[:, None] * (C + R) + r, mask=r < R, other=0.0)
                c_kv = page_rows.load([number, -missing, 0]).reshape(PAGE, C_PAD)
                c_kv, k_pe = dot_operand(c_kv, False), dot_operand(k_pe, False)
                key = tl.where(j < missing, HIDDEN, at - missing + j)
                number = tl.load(own_ptr + at // PAGE + 1, mask=at + PAGE < high, other=0)  # of the next step
            else:
                key = at + tl.arange(0, KEYS)
                in_pool = tl.load(own_ptr + at // PAGE).to(tl.int64) * PAGE + key % PAGE
                c_kv, k_pe = load_latents(latents_ptr, scales_ptr, k_pe_ptr, in_pool, key < high, C, R, C_PAD, R_PAD)
            if SWAP:
                scores = tl.dot(k_pe, q_pe.T, tl.dot(c_kv, q.T))  # (KEYS, ROWS)
            else:
                scores = tl.dot(q_pe, k_pe.T, tl.dot(q, c_kv.T))
            p, kept, best, total = join(scores, position, key, best, total, scale, axis)
            p = dot_operand(p, False)
            acc *= tl.expand_dims(kept, axis)
            acc = tl.dot(c_kv.T, p, acc) if SWAP else tl.dot(p, c_kv, acc)

        out = acc * tl.expand_dims(end_segment(lse_ptr, lse_row, real, best, total), axis)
        out_ptrs = out_ptr + lse_row.to(tl.int64)[:, None] * C + c
        tl.store(out_ptrs, out.T if SWAP else out, mask=real[:, None] & (c < C))


# --------------------------------------------------------------------------------------------------------------------
# The op
# --------------------------------------------------------------------------------------------------------------------


# Adds up decode's parts: what decode_kernel wrote (out, lse, parts), the first token, the end, how far on the next is.
Finish = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int], None]


def decode(
    q: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    batch_bounds: BatchBounds,
    scale: float,
    fixed: bool = False,
    programs: int | None = None,
    tile: AttentionTile | None = None,
    finish: Finish | None = None,
) -> torch.Tensor:
    """The first sequences' rows in the latent space: q (T, N, C) absorbed, q_pe (T, N, R) to (T, N, C).

    `finish` adds the parts up instead; what is returned is then empty.

    `batch_bounds` says which they are. With `fixed` parts and tiles depend on the number of heads alone; otherwise
    programs, which share the work, and tile are the caller's choice.
    """
    n_tokens, n_heads, c = q.shape
    r, page = q_pe.shape[-1], latents.shape[1]
    packed, arch = latents.dtype == torch.uint8, architecture(q.device)
    tile = tile or tile_for(DECODE[arch, packed], math.inf if fixed else batch_bounds.longest_q * n_heads)
    assert q.is_contiguous() and page % tile.keys == 0 and n_tokens == batch_bounds.tokens
    programs = programs or SM_COUNT[arch] * tile.programs
    page_rows = page_descriptor(latents, c) if tile.descriptor and not fixed else None
    launch = pdl.options(arch)
    lanes = triton.cdiv(n_heads, tile.rows)  # side by side, so that they find a page in the cache
    fixed_pages = FIXED_SPLIT // page if fixed else 0
    out = torch.empty(0 if finish else n_tokens, n_heads, c, dtype=q.dtype, device=q.device)

    def runs(tokens: int) -> tuple[int, int]:
        return count_runs(batch_bounds, tokens, n_heads, tile.rows, page, programs, fixed_pages)

    def rows(tokens: int) -> int:
        return min(tile.rows, min(batch_bounds.longest_q, tokens) * n_heads)

    at_once = n_tokens
    while at_once > 1 and runs(at_once)[1] * lanes * rows(at_once) * c * 4 > SPLIT_BYTES:
        at_once = triton.cdiv(at_once, 2)
    width = rows(at_once)
    partial = torch.empty(runs(at_once)[1] * lanes, width, c, dtype=torch.float32, device=q.device)
    lse = torch.empty(runs(at_once)[1] * lanes, width, dtype=torch.float32, device=q.device)
    parts = torch.empty(at_once, n_heads, 2, dtype=torch.int32, device=q.device)
    for first in range(0, n_tokens, at_once):
        last = min(first + at_once, n_tokens)
        n_runs, n_segments = runs(last - first)
        key = batch_bounds, first, last, n_heads, tile.rows, n_runs, fixed_pages
        if key not in batch.memo:
            plan = [torch.empty(n, dtype=torch.int32, device=q.device) for n in (2 * n_runs, 5 * n_segments)]
            batch.memo[key] = plan
            plan_runs_kernel[(batch_bounds.n,)](
                batch.kv_lens, batch.cu_seqlens_q, *plan, n_runs, first, last, fixed_pages, n_heads, tile.rows * lanes,
                page, num_warps=1, **launch,
            )  # fmt: skip
        n_programs, values, scales, k_pe = n_runs * lanes, *pool(latents, c)
        tables = batch.cu_seqlens_q, batch.pages, batch.positions, *batch.memo[key], partial, lse, parts
        numbers = batch.pages.stride(0), first, last, width, scale * LOG2_E
        if tile.by_group and not fixed:
            decode_fp8_kernel[(n_programs,)](
                q, q_pe.contiguous(), values, scales, k_pe, *tables, *numbers,
                N=n_heads, C=c, R=r, R_PAD=padded(r), PAGE=page, LANES=lanes, ROWS=tile.rows,
                BLOCK=min(BLOCK_SIZE, padded(c)), **tile.options(), **launch,
            )  # fmt: skip
        else:
            decode_kernel[(n_programs,)](
                q, q_pe.contiguous(), values, scales, k_pe, page_rows, *tables, *numbers,
                N=n_heads, C=c, R=r, C_PAD=padded(c), R_PAD=padded(r), PAGE=page, LANES=lanes, SWAP=tile.swap,
                **tile.constexprs(), **tile.options(), **launch,
            )  # fmt: skip
        if finish:
            finish(partial, lse, parts, first, last, lanes * width)
            continue
        combine_parts_kernel[((last - first) * n_heads, triton.cdiv(c, COLUMNS))](
            partial, lse, parts, out, first, lanes * width,
            N=n_heads, C=c, COLUMNS=COLUMNS, PARTS=PARTS, num_warps=COMBINE_WARPS, **launch,
        )  # fmt: skip
    return out
