"""decode.py's kernel for latents packed in FP8, on Hopper: no row is filled up, and no number is rounded to bfloat16.

e4m3 numbers are float16 numbers, which one instruction makes of two; their scales, one for each 128 channels of a key,
multiply what comes of the channels instead: scores before they are added up, and weights before they multiply values.
Queries are scaled into float16's range by a power of two for each row.

Names: T, N, C, R, P as in model.py.
"""

# ruff: noqa: RUF005  (Triton does not know how to unpack a tuple into another)
# mypy: disable-error-code="assignment,misc"
import triton
import triton.language as tl

from ops.gpu.casts import INTERPRETED, SCALE_BLOCK, widen_e4m3
from ops.gpu.decode_runs import NOTHING, begin_segment, end_segment, join
from ops.gpu.pdl import wait_for_previous

RAISED = tl.constexpr(64.0)  # weights times scales, of 448ths of a latent, are raised by it out of float16's subnormals


@triton.jit
def half(x):
    if INTERPRETED:  # its products of anything but float32 are wrong
        return x.to(tl.float32)
    else:
        return x.to(tl.float16)


@triton.jit
def load_groups(values_ptr, row, C: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of e4m3 values in groups of BLOCK channels."""
    values = ()
    for g in tl.static_range(GROUPS):
        c = g * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(values_ptr + row[:, None] * WIDTH + c, mask=None if (g + 1) * BLOCK <= C else c < C)
        values = values + (x,)
    return values


@triton.jit
def widen(values, GROUPS: tl.constexpr):
    wide = ()
    for g in tl.static_range(GROUPS):
        wide = wide + (half(widen_e4m3(values[g]) if values[g].dtype == tl.uint8 else values[g]),)
    return wide


@triton.jit(do_not_specialize=["bounds_ptr", "pages_ptr", "positions_ptr", "P", "first", "last", "width"])
def decode_fp8_kernel(
    q_ptr, q_pe_ptr, latents_ptr, scales_ptr, k_pe_ptr, bounds_ptr, pages_ptr, positions_ptr,
    runs_ptr, segments_ptr, out_ptr, lse_ptr, parts_ptr, P, first, last, width, scale,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, PAGE: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As decode_kernel with SWAP, a page to each step, its values in groups of BLOCK channels that share a scale.

    A step asks for the next page once it has its scores. It ends with that page widened in registers: as what a step
    begins with Triton stores it to shared memory once, where both products read it."""
    wait_for_previous()
    GROUPS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    WIDTH: tl.constexpr = C + 4 * ((C + SCALE_BLOCK - 1) // SCALE_BLOCK) + 2 * R
    run, lane = tl.program_id(0) // LANES, tl.program_id(0) % LANES
    j, r = tl.arange(0, PAGE), tl.arange(0, R_PAD)[None, :]
    for segment in tl.range(tl.load(runs_ptr + 2 * run), tl.load(runs_ptr + 2 * run + 1), disable_licm=True):
        lse_row = (segment * LANES + lane) * width + tl.arange(0, ROWS)
        sequence, real, index, position, low, high = begin_segment(
            segments_ptr + 5 * segment, bounds_ptr, positions_ptr, parts_ptr, lse_row, first, last, N, ROWS, LANES, PAGE
        )
        largest = tl.zeros((ROWS,), tl.float32)
        accs = ()
        for g in tl.static_range(GROUPS):
            c = g * BLOCK + tl.arange(0, BLOCK)[None, :]
            q = tl.load(q_ptr + index[:, None] * C + c, mask=real[:, None] & (c < C), other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(q.to(tl.float32)), 1))
            accs = accs + (tl.zeros((BLOCK, ROWS), tl.float32),)
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x00800000)
        unit = exponent.to(tl.float32, bitcast=True)  # the power of two that is not above it
        qs = ()
        for g in tl.static_range(GROUPS):
            c = g * BLOCK + tl.arange(0, BLOCK)[None, :]
            q = tl.load(q_ptr + index[:, None] * C + c, mask=real[:, None] & (c < C), other=0.0)
            qs = qs + (half(q.to(tl.float32) * (1.0 / unit)[:, None]),)
        q_pe = tl.load(q_pe_ptr + index[:, None] * R + r, mask=real[:, None] & (r < R), other=0.0)
        q_pe = q_pe.to(tl.float32) if INTERPRETED else q_pe

        best = tl.full((ROWS,), NOTHING, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        own_ptr = pages_ptr + sequence.to(tl.int64) * P
        # A key past the end is the last one, seen from too far: what its place holds may be NaN.
        start = tl.load(own_ptr + low // PAGE).to(tl.int64) * (PAGE * WIDTH)  # in bytes
        row = tl.maximum(tl.minimum(j, high - low - 1), 0)
        values = widen(load_groups(latents_ptr + start, row, C, WIDTH, GROUPS, BLOCK), GROUPS)
        for at in tl.range(low, high, PAGE, num_stages=1, disable_licm=True):
            start = tl.load(own_ptr + at // PAGE).to(tl.int64) * (PAGE * WIDTH)  # carried on, it would spill
            row = tl.minimum(j, high - 1 - at)
            k_pe = tl.load(k_pe_ptr + start // 2 + row[:, None] * (WIDTH // 2) + r, mask=r < R, other=0.0)
            scales = ()
            for g in tl.static_range(GROUPS):
                scales = scales + (tl.load(scales_ptr + start // 4 + row * (WIDTH // 4) + g),)
            products = ()
            for g in tl.static_range(GROUPS):
                products = products + (tl.dot(values[g], qs[g].T),)
            scores = products[0] * scales[0][:, None]
            for g in tl.static_range(1, GROUPS):
                scores += products[g] * scales[g][:, None]
            k_pe = k_pe.to(tl.float32) if INTERPRETED else k_pe
            scores = tl.dot(k_pe, q_pe.T, scores * unit[None, :])
            following = tl.minimum(at + PAGE, high - 1) // PAGE
            start = tl.load(own_ptr + following).to(tl.int64) * (PAGE * WIDTH)
            row = tl.minimum(j, high - 1 - following * PAGE)
            ahead = load_groups(latents_ptr + start, row, C, WIDTH, GROUPS, BLOCK)
            p, kept, best, total = join(scores, position, at + j, best, total, scale, 0)
            p *= RAISED
            sums = ()
            for g in tl.static_range(GROUPS):
                weights = half(p * scales[g][:, None])
                sums = sums + (tl.dot(values[g].T, weights, accs[g] * kept[None, :]),)
            accs = sums
            values = widen(ahead, GROUPS)

        factor = end_segment(lse_ptr, lse_row, real, best, total) * (1.0 / RAISED)
        for g in tl.static_range(GROUPS):
            c = g * BLOCK + tl.arange(0, BLOCK)[None, :]
            out_ptrs = out_ptr + lse_row.to(tl.int64)[:, None] * C + c
            tl.store(out_ptrs, (accs[g] * factor[None, :]).T, mask=real[:, None] & (c < C))
