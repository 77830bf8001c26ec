"""Attention of sequences with many query rows: the multi-head form, in Triton.

Slabs of latents, as large as a bounded workspace, are gathered from their pages and expanded to keys and values by
plain matrix products. A flash kernel attends to one slab after the other and carries its result along.

Names: T, N, C, R, P, dn, dv as in model.py. *_PAD is the power of two that a tile's side is padded to.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from core.batch import Batch
from ops.gpu.attention_tiles import PREFILL, AttentionTile
from ops.gpu.casts import cast, dot_operand
from ops.gpu.decode_runs import HIDDEN, NOTHING
from ops.gpu.device import architecture
from ops.gpu.latents import load_latents, padded, pool
from ops.gpu.tiles import tile_for

LOG2_E = math.log2(math.e)  # the kernel's exponentials are powers of two
GATHERED, GATHER_WARPS = 64, 8  # keys and warps of a gather program
# The most that keys and values may take that are expanded at one time. A key takes N (dn + dv) values and its latent:
# for the 16 heads of V3 on one rank of eight 2 (16 x 256 + 576) = 9,344 bytes, so that a slab has 114,912 keys, and a
# prompt of 131,072 takes two; with all 128 heads 66,688 bytes, 16,100 keys.
SLAB_BYTES = 1 << 30


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
    q, q_pe, acc, best, total, position, k_ptr, k_pe_ptr, v_ptr, k_rows, pe_rows, v_rows, offset, head, low, high,
    scale,
    N: tl.constexpr, DN: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, DN_PAD: tl.constexpr, R_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of query rows over the keys [low, high): (acc, best, total) carried on. Without MASKED every row sees all
    of them, and they are a multiple of KEYS.

    Through descriptors the last tile ends with the last key: no row behind it is read, which may hold NaN. Those before
    are not counted again."""
    d, r, e = tl.arange(0, DN_PAD)[None, :], tl.arange(0, R_PAD)[None, :], tl.arange(0, DV_PAD)[None, :]
    for at in tl.range(low, high, KEYS, num_stages=STAGES, disable_licm=MASKED):
        key = at + tl.arange(0, KEYS)
        row = key.to(tl.int64)[:, None]
        start = offset + at
        if k_rows is not None:
            if MASKED:
                start = offset + tl.minimum(at, high - KEYS)
                key = tl.where(start - offset + tl.arange(0, KEYS) < at, HIDDEN, start - offset + tl.arange(0, KEYS))
            k, k_pe = k_rows.load([start, head * DN]), pe_rows.load([start, 0])
        else:
            inside = (key < high)[:, None] if MASKED else (key >= 0)[:, None]
            k = tl.load(k_ptr + row * (N * DN) + d, mask=inside & (d < DN), other=0.0)
            k_pe = tl.load(k_pe_ptr + row * R + r, mask=inside & (r < R), other=0.0)
        scores = tl.dot(q, dot_operand(k, False).T)
        scores = tl.dot(q_pe, dot_operand(k_pe, False).T, scores)
        if MASKED:
            last = tl.minimum(position, high - 1)
            scores = tl.where(key[None, :] <= last[:, None], scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - peak[:, None])
        kept = tl.exp2(best - peak)
        total = total * kept + tl.sum(p, 1)
        if k_rows is not None:
            v = v_rows.load([start, head * DV])
        else:
            v = tl.load(v_ptr + row * (N * DV) + e, mask=inside & (e < DV), other=0.0)
        acc = tl.dot(dot_operand(p, False), dot_operand(v, False), acc * kept[:, None])
        best = peak
    return acc, best, total


@triton.jit(do_not_specialize=["positions_ptr", "bounds_ptr", "lengths_ptr", "slab", "n_slab"])
def prefill_kernel(
    q_ptr, q_pe_ptr, k_ptr, k_pe_ptr, v_ptr, k_rows, pe_rows, v_rows, positions_ptr, bounds_ptr, lengths_ptr, ends_ptr,
    out_ptr, state_ptr, lse_ptr, slab, n_slab, scale,
    N: tl.constexpr, DN: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, DN_PAD: tl.constexpr, R_PAD: tl.constexpr,
    DV_PAD: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS query tokens of one sequence and head over that part of their keys which lies in a slab (gather_kernel).

    q (T, N, dn) with strides Q_TOKEN and Q_HEAD, q_pe (T, N, R), k (n_slab, N, dn), k_pe (n_slab, R), v (n_slab, N,
    dv), of which k_rows, pe_rows and v_rows are descriptors or None, out (T, N, dv). A row that has keys in slabs to
    come leaves its result so far, normalised, in state (T, N, dv) and its weight's binary logarithm in lse (T, N), both
    float32, and goes on from there in the next. `scale` includes log2(e).
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
    best = tl.load(lse_ptr + index, mask=known, other=NOTHING)
    total = tl.where(known, 1.0, 0.0)

    k_ptr += offset.to(tl.int64) * (N * DN) + head * DN
    k_pe_ptr += offset.to(tl.int64) * R
    v_ptr += offset.to(tl.int64) * (N * DV) + head * DV
    seen_by_all = tl.minimum(tl.load(positions_ptr + begin).to(tl.int32) + 1, high)
    middle = low + tl.maximum(seen_by_all - low, 0) // KEYS * KEYS
    acc, best, total = attend(
        q, q_pe, acc, best, total, position, k_ptr, k_pe_ptr, v_ptr, k_rows, pe_rows, v_rows, offset, head,
        low, middle, scale, N, DN, R, DV, DN_PAD, R_PAD, DV_PAD, KEYS, False, STAGES,
    )  # fmt: skip
    acc, best, total = attend(
        q, q_pe, acc, best, total, position, k_ptr, k_pe_ptr, v_ptr, k_rows, pe_rows, v_rows, offset, head,
        middle, high, scale, N, DN, R, DV, DN_PAD, R_PAD, DV_PAD, KEYS, True, STAGES,
    )  # fmt: skip

    total = tl.where(total == 0, 1.0, total)  # rows past the end
    acc *= (1.0 / total)[:, None]
    inside = real[:, None] & (e < DV)
    if high == end:
        tl.store(out_ptr + index[:, None] * DV + e, cast(acc, out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(state_ptr + index[:, None] * DV + e, acc, mask=inside)
        tl.store(lse_ptr + index, best + tl.log2(total), mask=real)


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
    if "ends" not in batch.memo:
        batch.memo["ends"] = lengths.cumsum(0, dtype=torch.int32)
    ends = batch.memo["ends"]
    widths = c, r, n_heads * dn, n_heads * dv
    c_kv, k_pe, k, v = (torch.empty(n_slab, w, dtype=q_nope.dtype, device=q_nope.device) for w in widths)
    carried = n_slab < batch_bounds.total_kv
    state = torch.empty(out.shape if carried else 0, dtype=torch.float32, device=out.device)
    lse = torch.empty(out.shape[:2] if carried else 0, dtype=torch.float32, device=out.device)
    for slab in range(0, batch_bounds.total_kv, n_slab):
        n = min(n_slab, batch_bounds.total_kv - slab)
        gather_kernel[(triton.cdiv(batch_bounds.longest_kv, GATHERED), batch_bounds.n)](
            *pool(latents, c), pages, lengths, ends, c_kv, k_pe, pages.stride(0), slab, n,
            C=c, R=r, C_PAD=padded(c), R_PAD=padded(r), PAGE=page, KEYS=GATHERED, num_warps=GATHER_WARPS,
        )  # fmt: skip
        torch.mm(c_kv[:n], w_uk.flatten(0, 1).T, out=k[:n])
        torch.mm(c_kv[:n], w_uv.flatten(0, 1).T, out=v[:n])
        parts = (k[:n], padded(dn), dn), (k_pe[:n], padded(r), r), (v[:n], padded(dv), dv)
        through = tile.descriptor and all(
            x.stride(0) * x.itemsize % 16 == 0 == d * x.itemsize % 16 for x, _, d in parts
        )
        rows = [TensorDescriptor.from_tensor(x, [tile.keys, d]) if through else None for x, d, _ in parts]
        prefill_kernel[(triton.cdiv(batch_bounds.longest_q, tile.rows), n_heads, batch_bounds.n)](
            q_nope, q_pe.contiguous(), k, k_pe, v, *rows, batch.positions, bounds, lengths, ends, out, state, lse,
            slab, n, scale * LOG2_E,
            N=n_heads, DN=dn, R=r, DV=dv, DN_PAD=padded(dn), R_PAD=padded(r), DV_PAD=padded(dv),
            Q_TOKEN=q_nope.stride(0), Q_HEAD=q_nope.stride(1), **tile.constexprs(), **tile.options(),
        )  # fmt: skip
