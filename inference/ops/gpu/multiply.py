"""The inner loop of the GEMMs in Triton, dense and grouped: rows of x by rows of w of 8 or 4 bits, or as they are.

Names: N output channels, K input channels; 128 x 128 weights share a scale, or GROUP channels of a row.
"""

import triton
import triton.language as tl

from ops.gpu.casts import SCALE_BLOCK, dot_operand, widen_int4


@triton.jit
def multiply_rows(
    x_ptr, x_s_ptr, x_row, w_ptr, w_s_ptr, w_z_ptr, w_row, n, N, K, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Rows x_row (BLOCK_M,) of x (…, K) times rows w_row (BLOCK_N,) of w (…, K) transposed: float32 (BLOCK_M, BLOCK_N),
    or with SWAP (BLOCK_N, BLOCK_M). The inner loop of the dense and of the grouped GEMM.

    With x_s_ptr, scales of x (…, K blocks): FP8 by FP8, whose 128-channel products are promoted to float32 (W8A8).
    Without: bfloat16 by FP8 or int8, widened in the loop (W8A16), or by int32 w (…, K/8), INT4 as `interleave` has it
    (W4A16). Without w_s_ptr either: bfloat16 or float32 by the same.
    Where GROUP is 0, w_s_ptr is the row of block scales that all of w_row have. Otherwise each row has a scale for
    every GROUP channels, 32, 64 or 128, of which K is a multiple: w_s_ptr is (K / GROUP, N), of which columns n
    (BLOCK_N,) are w_row's, and w_z_ptr the zero points of INT4, of the same shape, or None where all are 8.
    With SPLIT the grid's second axis cuts K in parts, and this is the sum of the program's own part. Channels past the
    end are zeros.
    """
    FP8: tl.constexpr = x_s_ptr is not None
    SCALED: tl.constexpr = w_s_ptr is not None
    INT4: tl.constexpr = w_ptr.dtype.element_ty == tl.int32
    FLOAT32: tl.constexpr = w_ptr.dtype.element_ty == tl.float32
    SPAN: tl.constexpr = GROUP if GROUP else SCALE_BLOCK  # channels to a product
    WORD: tl.constexpr = 8 if INT4 else 1  # channels to a number of w
    PRODUCTS: tl.constexpr = SCALE_BLOCK // SPAN
    k = tl.arange(0, SPAN)
    k_blocks = tl.cdiv(K, SCALE_BLOCK)  # in a row, that is; `blocks` are this program's, `channels` as far as the end
    blocks, channels = k_blocks, K
    if SPLIT:
        per_part = tl.cdiv(k_blocks, tl.num_programs(1))
        first = tl.program_id(1) * per_part
        blocks = tl.minimum(per_part, k_blocks - first)  # below 1 where earlier parts took them all
        channels -= first * SCALE_BLOCK
        x_ptr += first * SCALE_BLOCK
        w_ptr += first * (SCALE_BLOCK // WORD)
        if GROUP:
            w_s_ptr += first * PRODUCTS * N
            if w_z_ptr is not None:
                w_z_ptr += first * PRODUCTS * N
        elif SCALED:
            w_s_ptr += first
        if FP8:
            x_s_ptr += first
    x_ptrs = x_ptr + x_row[:, None] * K + k[None, :]
    w_ptrs = w_ptr + w_row[:, None] * (K // WORD) + tl.arange(0, SPAN // WORD)[None, :]
    if FP8:
        x_s_ptrs = x_s_ptr + x_row * k_blocks
    if GROUP:
        next_scales = group_scales(w_s_ptr, n, N, channels, GROUP)
        if w_z_ptr is not None:
            next_zeros = group_scales(w_z_ptr, n, N, channels, GROUP)

    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):  # said here, not at the launch, it holds for the scales too
        left = channels - i * SCALE_BLOCK
        if GROUP:  # two bytes or one to a thread are too few for the pipeline: the next block's are asked for by hand
            scales = next_scales
            w_s_ptr += PRODUCTS * N
            next_scales = group_scales(w_s_ptr, n, N, left - SCALE_BLOCK, GROUP)
            if w_z_ptr is not None:
                zeros = next_zeros
                w_z_ptr += PRODUCTS * N
                next_zeros = group_scales(w_z_ptr, n, N, left - SCALE_BLOCK, GROUP)
        for product in tl.static_range(PRODUCTS):
            if GROUP:
                inside = left > product * SPAN
            else:
                inside = (k < left)[None, :]
            x = tl.load(x_ptrs + product * SPAN, mask=inside, other=0.0)
            w = tl.load(w_ptrs + product * (SPAN // WORD), mask=inside, other=0.0)
            if INT4:
                w = widen_int4(w, None if w_z_ptr is None else zeros[product])
            elif not FLOAT32:
                w = dot_operand(w, FP8)
            if not FLOAT32:
                x = dot_operand(x, FP8)
            if SCALED:
                if GROUP:
                    scale = scales[product].to(tl.float32)
                    scale = scale[:, None] if SWAP else scale[None, :]
                else:
                    scale = tl.load(w_s_ptr + i)
                    if FP8:
                        scale = tl.load(x_s_ptrs + i) * scale
                        scale = scale[None, :] if SWAP else scale[:, None]
                acc += (tl.dot(w, x.T) if SWAP else tl.dot(x, w.T)) * scale
            else:
                if SWAP:
                    acc = tl.dot(w, x.T, acc, input_precision="ieee")
                else:
                    acc = tl.dot(x, w.T, acc, input_precision="ieee")
        x_ptrs += SCALE_BLOCK
        w_ptrs += SCALE_BLOCK // WORD
    return acc


@triton.jit
def group_scales(ptr, n, N, channels, GROUP: tl.constexpr):
    """The scales or zero points of columns n of a block's groups, one after another; zeros past `channels` and N."""
    found = ()
    for group in tl.static_range(SCALE_BLOCK // GROUP):
        inside = (n < N) & (group * GROUP < channels)
        found += (tl.load(ptr + group * N + n, mask=inside, other=0),)  # type: ignore[assignment]
    return found
