"""Every op in plain torch, written to be read: this is the specification the kernels are tested against."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from core.batch import Batch
from core.config import BLOCK_SIZE
from ops.formats import PartialSums, Quantised, Routing, Scales

# --------------------------------------------------------------------------------------------------------------------
# Block quantisation: FP8 (technical report, section 3.3), INT8 and INT4
# --------------------------------------------------------------------------------------------------------------------

BLOCK = (BLOCK_SIZE, BLOCK_SIZE)  # rows and columns of an FP8 weight that share a scale
INT4_ZERO = 8  # the zero point of a signed value, -8 to 7, that is stored from 0 to 15


def quantised(x: torch.Tensor, fp8: Scales, keep: bool = False) -> Quantised:
    """x (T, K) through act_quant with scales of the format `fp8`; `keep` holds on to x itself."""
    q, s = act_quant(x, scale_fmt=None if fp8 == "float32" else fp8)
    return Quantised(q, s, x if keep else None, x.dtype)


def act_quant(
    x: torch.Tensor,
    block_size: int = BLOCK_SIZE,
    scale_fmt: str | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K) to FP8 values (..., K) and their float32 scales (..., ceil(K / block_size)): x is about q * s.

    Each token's channels are scaled in blocks: s = max(|x|, 1e-4) / 448, the format's largest number (report, section
    3.3.2). With scale_fmt "ue8m0", s is first rounded up to a power of two, and x is divided by that rounded scale.
    dtype may also be float8_e4m3fnuz, whose largest number is 240. A block with a NaN or an infinity holds NaN.
    """
    assert scale_fmt in (None, "ue8m0"), scale_fmt
    blocks = F.pad(x.float(), (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size))
    largest = blocks.new_tensor(torch.finfo(dtype).max)  # a tensor: CUDA multiplies by a plain number's reciprocal
    s = blocks.abs().amax(dim=-1).clamp(min=1e-4) / largest
    if scale_fmt == "ue8m0":
        s = round_up_to_power_of_two(s)
    q = (blocks / s.unsqueeze(-1)).to(dtype)
    return q.flatten(-2)[..., : x.shape[-1]].contiguous(), s


def round_up_to_power_of_two(s: torch.Tensor) -> torch.Tensor:
    """The least power of two >= s, for positive normal float32 s; infinities and NaNs stay what they are.

    A carry out of the mantissa moves the exponent, so adding all ones rounds up whatever is not yet a power of two:
    exact, where ceil(log2(s)) is off by one next to powers of two.
    """
    bits = (s.view(torch.int32) + 0x007FFFFF) & 0x7F800000
    return torch.where(s.isfinite(), bits.view(torch.float32), s)


def weight_dequant(
    w: torch.Tensor,
    s: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    block: tuple[int, int] = BLOCK,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantised w (..., N, K) times its scales s, one for each block of (rows, columns), rounded once to dtype.

    Its data is e4m3, int8, or uint8 (..., N, K/2) of INT4, whose zero points, uint8, are as many as its scales.
    """
    values = widened(w, block, zero)
    _check_scales(values, s, block)
    out = torch.empty(values.shape, dtype=dtype, device=w.device)
    for i in range(s.shape[-2]):
        rows = slice(i * block[0], (i + 1) * block[0])
        out[..., rows, :] = values[..., rows, :].float() * _per_column(s[..., i : i + 1, :], block, values)
    return out


def widened(w: torch.Tensor, block: tuple[int, int] = BLOCK, zero: torch.Tensor | None = None) -> torch.Tensor:
    """The values (..., N, K) that quantised weights stand for, without their scales: e4m3 and int8 as they are, INT4
    uint8 (..., N, K/2), whose byte has the even k in its low four bits, less its zero points, int8 from -15 to 15."""
    if w.dtype != torch.uint8:
        return w
    values = unpack_int4(w).to(torch.int8)
    if zero is None:
        return values - INT4_ZERO
    return values - _per_column(zero.to(torch.int8), block, values)


def fp8_gemm(
    a: torch.Tensor, a_s: torch.Tensor, b: torch.Tensor, b_s: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """W8A8: a (M, K) times b (N, K) transposed, both FP8, to (M, N).

    a_s (M, ceil(K/128)) and b_s (ceil(N/128), ceil(K/128)) are float32. The product of each 128 channels is scaled
    and added up in float32 (report, section 3.3.2: FP8 tensor cores alone keep about 14 bits).
    """
    _check_scales(b, b_s)
    assert a_s.shape == (a.shape[0], b_s.shape[1]), (a.shape, a_s.shape)
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
    for k in range(b_s.shape[1]):
        channels = slice(k * BLOCK_SIZE, (k + 1) * BLOCK_SIZE)
        partial = a[:, channels].float() @ b[:, channels].float().T  # (M, N)
        out += partial * (a_s[:, k, None] * _per_row(b_s[:, k], b))
    return out.to(out_dtype)


def unpack_int4(w: torch.Tensor) -> torch.Tensor:
    """INT4 (..., N, K/2) as it is stored, each number by itself: uint8 (..., N, K), from 0 to 15."""
    return torch.stack((w & 15, w >> 4), dim=-1).flatten(-2)


def w8a16_gemm(
    x: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """W8A16: x (M, K), bfloat16 or float32, times FP8 or int8 b (N, K) transposed, to (M, N) in out_dtype or x's.

    b_s (ceil(N / block[0]), ceil(K / block[1])). The weights are widened exactly (every e4m3 number and every int8 is a
    bfloat16 number); the product of each block's channels is scaled and added up in float32.
    """
    return _block_gemm(x, b, b_s, out_dtype or x.dtype, block)


def w4a16_gemm(
    x: torch.Tensor,
    b: torch.Tensor,
    b_s: torch.Tensor,
    zero: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """W4A16: x (M, K), bfloat16 or float32, times INT4 b, uint8 (N, K/2), transposed, to (M, N) in out_dtype or x's.

    b_s (N, K/G), bfloat16, float16 or float32, and zero, uint8 of the same shape, for groups of G channels. The product
    of each group is scaled and added up in float32.
    """
    block = 1, x.shape[1] // b_s.shape[1]
    return _block_gemm(x, widened(b, block, zero), b_s, out_dtype or x.dtype, block)


def _block_gemm(
    x: torch.Tensor, values: torch.Tensor, s: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]
) -> torch.Tensor:
    """x (M, K) times values (N, K) transposed: each block's product scaled, summed in float32, and rounded to dtype."""
    _check_scales(values, s, block)
    out = torch.zeros(x.shape[0], values.shape[0], dtype=torch.float32, device=x.device)
    for k in range(s.shape[1]):
        channels = slice(k * block[1], (k + 1) * block[1])
        partial = x[:, channels].float() @ values[:, channels].float().T  # (M, N)
        out += partial * _per_row(s[:, k].float(), values, block[0])
    return out.to(dtype)


def fixed_point(x: torch.Tensor) -> torch.Tensor:
    """x (M, K), K a multiple of 32, in float32 as a CPU may round it for products by quantised weights: each 32 numbers
    of a row to whole ones of 13 bits and a sign, times a power of two, so that the largest just fits.

    A bfloat16 number is exact within a factor of 32 of its group's largest; below that its error is at most 2^-13 of
    that. e4m3 weights are rounded alike, by the largest of some rows (16 or 32, that a processor takes together) of a
    scale's channels, and so exact within a factor of 512; int8 and INT4 are exact. The products of 32 channels then fit
    in 32 bits, and are exact. A NaN or an infinity makes all of its row's results NaN; a group whose largest is below
    2^-114 counts as zeros.
    """
    groups = x.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    step = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 13)
    return ((groups / step).round() * step).flatten(-2)


def summed(y: torch.Tensor | PartialSums) -> torch.Tensor:
    """A product as it is, or made of its partial sums."""
    if isinstance(y, torch.Tensor):
        return y
    total = y.parts[0]
    for part in y.parts[1:]:
        total = total + part
    return total.to(y.dtype)


def norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    delta: torch.Tensor | None = None,
    fp8: Scales | None = None,
    keep: bool = True,
) -> tuple[torch.Tensor | Quantised, torch.Tensor]:
    """RMSNorm of x (T, H) + delta (T, H) and that sum itself, the next residual; without delta x is the sum.

    The sum is rounded to x's dtype, then normed. If fp8 names the scales, the norm is quantised as it was rounded, and
    with `keep` also kept.
    """
    total = x if delta is None else x + delta
    y = rms_norm(total, weight, eps)
    return quantised(y, fp8, keep) if fp8 else y, total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in float32, rounded once to x's dtype."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def to_fnuz(w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn weights and their scales as float8_e4m3fnuz, the FP8 type of AMD's CDNA 3, without rounding.

    The same bits mean half the value there, so the scales double; 0x80, -0 before, means NaN there and becomes 0, and
    the two old NaNs become 0x80.
    """
    bits = w.view(torch.uint8)
    nan = (bits & 0x7F) == 0x7F
    fnuz = bits.masked_fill(bits == 0x80, 0).masked_fill(nan, 0x80)
    return fnuz.view(torch.float8_e4m3fnuz), s * 2


def _per_row(s: torch.Tensor, b: torch.Tensor, rows: int = BLOCK_SIZE) -> torch.Tensor:
    """One number for so many rows of b, (ceil(N / rows),), as one per row, (N,)."""
    return s.repeat_interleave(rows)[: b.shape[0]]


def _per_column(s: torch.Tensor, block: tuple[int, int], values: torch.Tensor) -> torch.Tensor:
    """One number per block of columns, (..., ceil(K / block[1])), as one per column of values, (..., K)."""
    return s.repeat_interleave(block[1], dim=-1)[..., : values.shape[-1]]


def _check_scales(w: torch.Tensor, s: torch.Tensor, block: tuple[int, int] = BLOCK) -> None:
    expected = (*w.shape[:-2], -(-w.shape[-2] // block[0]), -(-w.shape[-1] // block[1]))
    assert s.shape == expected, f"weights {tuple(w.shape)} need scales {expected}, not {tuple(s.shape)}"


def project_float32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (rows, H) times w (V, H) transposed, in float32 (rows, V), without a float32 copy of all of w."""
    if w.dtype == torch.float32:
        return F.linear(x.float(), w)
    return torch.cat([x.float() @ part.float().T for part in w.split(4096)], dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# Mixture of experts (DeepSeekMoE: technical report, section 2.1.2)
# --------------------------------------------------------------------------------------------------------------------


def route(logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits (T, E), float32, to expert weights (T, K), float32, and expert ids (T, K), int64.

    Sigmoid or softmax scores (equation 15; V2 report, equation 22). `noaux_tc`: the bias takes part in the selection
    only, a group's worth is the sum of its two best biased scores; `group_limited_greedy`: its best score; experts of
    groups not kept get -inf, since a biased score can be negative. The weights are the unbiased scores of the chosen.
    """
    scores = logits.sigmoid() if rule.score_func == "sigmoid" else logits.softmax(dim=-1)  # (T, E)
    choice = scores if bias is None else scores + bias
    if rule.topk_method != "greedy" and rule.n_groups > 1:
        grouped = choice.unflatten(-1, (rule.n_groups, -1))  # (T, G, E/G)
        if rule.topk_method == "noaux_tc":
            worth = grouped.topk(2, dim=-1).values.sum(dim=-1)
        else:
            worth = grouped.amax(dim=-1)
        kept = worth.topk(rule.n_limited_groups, dim=-1).indices
        dropped = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(rule.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if rule.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * rule.route_scale, ids


def router(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, rule: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (T, H) and the router's weights (E, H) to expert weights (T, K), float32, and expert ids (T, K), int64.

    The logits are float32: products of bfloat16 numbers are exact there, and are summed in it.
    """
    return route(project_float32(x, w), bias, rule)


def silu_mul(
    gate_up: torch.Tensor | PartialSums, inter: int, fp8: Scales | None = None
) -> torch.Tensor | Quantised:
    """SwiGLU's product, silu(gate) * up, in float32 and rounded once to gate_up's dtype: (T, inter), then quantised
    if fp8 names the scales.

    gate_up (T, 2 I'), of which the gate's channels are the first `inter` and up's those from I' on.
    """
    gate, up = halves(summed(gate_up), inter)
    y = (F.silu(gate.float()) * up.float()).to(gate.dtype)
    return quantised(y, fp8) if fp8 else y


def halves(gate_up: torch.Tensor, inter: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, each (T, inter), views of a stacked product (T, 2 I') whose halves may end in filling."""
    gate, up = gate_up.chunk(2, dim=-1)
    assert gate.shape == up.shape and inter <= gate.shape[-1], (gate_up.shape, inter)
    return gate[..., :inter], up[..., :inter]


def experts(
    x: torch.Tensor | Quantised,
    weights: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    n_local: int,
    run: Callable[[int, Any], torch.Tensor],
) -> torch.Tensor:
    """The weighted sum of the experts [first, first + n_local) over the tokens routed to them: float32 (T, H).

    x (T, H), weights (T, K) float32, ids (T, K); `run(e, rows)` is local expert e's network on its rows.
    """
    take = x.take if isinstance(x, Quantised) else x.__getitem__
    out = torch.zeros((x.q if isinstance(x, Quantised) else x).shape, dtype=torch.float32, device=ids.device)
    flat = ids.flatten()
    order = flat.argsort(stable=True)  # the assignments, expert by expert, tokens in order within each
    tokens = order // ids.shape[1]
    start = int((flat < first).sum())
    counts = torch.bincount(flat, minlength=first + n_local)[first : first + n_local].tolist()
    for e, n in enumerate(counts):
        if n:
            rows = tokens[start : start + n]
            w = weights.flatten()[order[start : start + n]].unsqueeze(-1)
            out.index_add_(0, rows, run(e, take(rows)).float() * w)
        start += n
    return out


def sort(ids: torch.Tensor, first: int, n_local: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The assignments a = t * K + k of ids (T, K), expert by expert, in order within each, and their tiles of rows.

    order (T * K,) int32: the assignments of experts [first, first + n_local), the rest -1. tiles
    (min(T * K, n_local) + T * K // block_m, 3) int32, which is always enough: a tile's local expert, its first place in
    order, its number of rows, at most block_m; unused ones are -1.
    """
    flat = ids.flatten()
    order = torch.full(flat.shape, -1, dtype=torch.int32, device=ids.device)
    tiles = torch.full((min(len(flat), n_local) + len(flat) // block_m, 3), -1, dtype=torch.int32, device=ids.device)
    start = used = 0
    for e in range(n_local):
        rows = (flat == first + e).nonzero().flatten()
        order[start : start + len(rows)] = rows
        for done in range(0, len(rows), block_m):
            tiles[used] = tiles.new_tensor([e, start + done, min(len(rows) - done, block_m)])
            used += 1
        start += len(rows)
    return order, tiles


def grouped_gemm(
    x: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
    share: int,
    product: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Row a is x[a // share] times its expert's weights, for the assignments a in order: (len(order), N), in x's dtype.

    `product(e, rows)` multiplies rows by local expert e's weights. Rows of assignments that are not in order are zero.
    """
    out = x.new_zeros(len(order), product(0, x[:0]).shape[1])
    for e, start, rows in tiles[tiles[:, 0] >= 0].tolist():
        a = order[start : start + rows].long()
        out[a] = product(e, x[a // share])
    return out


def combine(
    y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, first: int, n_local: int, shared: torch.Tensor | None
) -> torch.Tensor:
    """The weighted sum of the assignments' rows y (T * K, H), over the experts [first, first + n_local) alone, plus the
    shared experts' (T, H): summed in float32 in the order of k, rounded once to y's dtype, (T, H)."""
    out = torch.zeros(len(ids), y.shape[1], dtype=torch.float32, device=y.device)
    local = (ids >= first) & (ids < first + n_local)  # (T, K)
    for k in range(ids.shape[1]):
        rows = y.unflatten(0, ids.shape)[:, k].float() * weights[:, k, None]
        out += rows.where(local[:, k, None], 0)
    return (out if shared is None else out + shared.float()).to(y.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Multi-head latent attention (V2 report, section 2.1; V3 report, section 2.1.1)
# --------------------------------------------------------------------------------------------------------------------

ALWAYS = 1 << 30  # query rows: more than any sequence has
KEY_TILE = 512  # keys whose scores exist at one time; bounds memory at any context length
SCORE_TILE = 1 << 24  # scores in flight, so query rows x heads x keys


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (2i, 2i+1) of x (T, ..., R) by its token's angles: cos and sin are (T, R/2), float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (-1,)
    cos, sin = cos.view(shape), sin.view(shape)
    a, b = pairs.unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention of every query over its own sequence's cached latents.

    q_nope (T, N, dn), q_pe (T, N, R) rotated, latents (n_pages, page, C + R) of this layer, w_uk (N, dn, C),
    w_uv (N, dv, C); returns (T, N, dv). Few query rows attend in the latent space (absorbed: the cache is read once
    for all heads and never expanded); many are cheaper against keys and values expanded a tile at a time.
    """
    out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
    few = absorbed_rows(w_uk, w_uv, q_pe.shape[-1])
    for rows, cached in _sequences(latents, batch, w_uk.shape[2], q_pe.dtype):
        form = mla_absorbed if rows.stop - rows.start <= few else mla_expanded
        out[rows] = form(q_nope[rows], q_pe[rows], cached, batch.positions[rows], w_uk, w_uv, scale)
    return out


def mla_batch_invariant(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
    row_block: int,
) -> torch.Tensor:
    """mla, all absorbed, `row_block` query rows at a time over key tiles of one size: a row's sums are ordered alike in
    any batch."""
    out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
    for rows, cached in _sequences(latents, batch, w_uk.shape[2], q_pe.dtype):
        cached = F.pad(cached, (0, 0, 0, -len(cached) % KEY_TILE))
        for at in range(rows.start, rows.stop, row_block):
            block = slice(at, min(at + row_block, rows.stop))
            fill = (0, 0, 0, 0, 0, row_block - (block.stop - at))
            seen = F.pad(batch.positions[block], (0, fill[-1]))
            nope, pe = F.pad(q_nope[block], fill), F.pad(q_pe[block], fill)
            out[block] = mla_absorbed(nope, pe, cached, seen, w_uk, w_uv, scale)[: block.stop - at]
    return out


def _sequences(latents: torch.Tensor, batch: Batch, c: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each sequence's query rows and its latents (L, C + R)."""
    bounds, lengths = batch.cu_seqlens_q.tolist(), batch.kv_lens.tolist()
    for b, length in enumerate(lengths):
        yield slice(bounds[b], bounds[b + 1]), gather(latents, batch.pages[b], length, c, dtype)


def absorbed_rows(w_uk: torch.Tensor, w_uv: torch.Tensor, rope: int) -> int:
    """Query rows up to which the absorbed form takes fewer operations: per key and head it does 2C + R
    multiplications a row against dn + R + dv, but saves expanding the key and value, C(dn + dv)."""
    dn, dv, c = w_uk.shape[1], w_uv.shape[1], w_uk.shape[2]
    saved = (2 * c + rope) - (dn + rope + dv)
    return c * (dn + dv) // saved if saved > 0 else ALWAYS


def gather(
    latents: torch.Tensor, pages: torch.Tensor, length: int, c: int = 0, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """One sequence's latents (length, C + R) in order of position, from the pages (n_pages, page, C + R) it holds.

    `c` and `dtype` say how to unpack latents that are kept in FP8.
    """
    page = latents.shape[1]
    used = pages[: -(-length // page)].tolist()
    first = used[0]
    if used == list(range(first, first + len(used))):
        rows = latents[first : first + len(used)].flatten(0, 1)[:length]  # neighbours: a view, nothing is copied
    else:
        rows = latents[used].flatten(0, 1)[:length]
    return unpack_latents(rows, c, dtype) if rows.dtype == torch.uint8 else rows


def norm_latents(
    kv: torch.Tensor | PartialSums,
    kv_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    latents: torch.Tensor,
    q: torch.Tensor | PartialSums | None = None,
    q_weight: torch.Tensor | None = None,
    fp8: Scales | None = None,
) -> torch.Tensor | Quantised | None:
    """Of kv (T, C + R) norms the first C channels, the keys' and values' latent, rotates the key's R, and writes both
    at the tokens' slots. Returns the norm of the queries' latent q (T, Q), quantised if `fp8` names the scales.

    cos and sin are (T, R/2) float32; slots (T,), of which negative ones are written nowhere; latents
    (n_pages, page, C + R) in kv's dtype, or rows of bytes as pack_latents makes them. V3 equations 1, 3 and 6.
    """
    c_kv, k_pe = summed(kv).split([len(kv_weight), 2 * cos.shape[1]], dim=-1)
    latent = torch.cat((rms_norm(c_kv, kv_weight, eps), rotary(k_pe, cos, sin)), dim=-1)  # (T, C + R)
    if latents.dtype == torch.uint8:
        latent = pack_latents(latent, c_kv.shape[1])
    kept = slots >= 0
    latents.flatten(0, 1).index_copy_(0, slots[kept].long(), latent[kept])
    if q is None or q_weight is None:
        return None
    return norm(summed(q), q_weight, eps, None, fp8, keep=False)[0]


def pack_latents(latent: torch.Tensor, c: int) -> torch.Tensor:
    """Latents (T, C + R) as bytes (T, packed_latent_bytes): the compressed key/value, the first c values, in e4m3 with
    a float32 scale per 128 of them, and the rotary key, which is small and sensitive, in bfloat16."""
    q, s = act_quant(latent[:, :c].contiguous())
    parts = q, s, latent[:, c:].to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)


def unpack_latents(rows: torch.Tensor, c: int, dtype: torch.dtype) -> torch.Tensor:
    """What pack_latents made bytes of, (L, C + R) in dtype."""
    scales = 4 * -(-c // BLOCK_SIZE)
    q, s, k_pe = (part.contiguous() for part in rows.split([c, scales, rows.shape[-1] - c - scales], dim=-1))
    s = s.view(torch.float32).repeat_interleave(BLOCK_SIZE, dim=-1)[:, :c]
    c_kv = q.view(torch.float8_e4m3fn).float() * s
    return torch.cat((c_kv.to(dtype), k_pe.view(torch.bfloat16).to(dtype)), dim=-1)


def mla_expanded(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    positions: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One sequence in the multi-head form: (n, N, dn), (n, N, R), (L, C + R) -> (n, N, dv)."""
    c = w_uk.shape[2]
    n_heads = q_nope.shape[1]

    def tile(lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        c_kv, k_pe = latents[lo:hi, :c], latents[lo:hi, c:]
        k = torch.cat((c_kv @ w_uk.mT, k_pe.expand(n_heads, -1, -1)), dim=-1)  # (N, t, dn + R)
        return k.float(), (c_kv @ w_uv.mT).float()  # (N, t, dv)

    q = torch.cat((q_nope, q_pe), dim=-1)
    return _attend(q, tile, latents.shape[0], positions, scale, w_uv.shape[1]).to(q.dtype)


def mla_absorbed(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    positions: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The same numbers without expanding the cache: W^UK moves into the query, W^UV behind the weighted sum."""
    c = w_uk.shape[2]

    def tile(lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = latents[None, lo:hi].float()  # one "head" of keys and values serves all
        return keys, keys[..., :c]

    q = torch.cat((torch.einsum("nhd,hdc->nhc", q_nope, w_uk), q_pe), dim=-1)  # (n, N, C + R)
    o = _attend(q, tile, latents.shape[0], positions, scale, c)  # (n, N, C)
    return torch.einsum("nhc,hvc->nhv", o.to(q.dtype), w_uv)


def _attend(
    q: torch.Tensor,
    tile: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    length: int,
    positions: torch.Tensor,
    scale: float,
    dv: int,
) -> torch.Tensor:
    """softmax(q k^T scale) v in float32 with an online softmax over tiles of keys: (n, N, d) -> (n, N, dv) float32.

    `tile(lo, hi)` gives float32 keys (N or 1, t, d) and values (N or 1, t, dv); position p sees key j iff j <= p.
    """
    n, n_heads, _ = q.shape
    out = torch.empty(n, n_heads, dv, dtype=torch.float32, device=q.device)
    step = max(1, SCORE_TILE // (n_heads * KEY_TILE))
    for at in range(0, n, step):
        rows = q[at : at + step].float().transpose(0, 1)  # (N, r, d)
        seen = positions[at : at + step]
        best = torch.full((*rows.shape[:2], 1), float("-inf"), device=q.device)
        total = torch.zeros_like(best)
        acc = torch.zeros(*rows.shape[:2], dv, device=q.device)
        for lo in range(0, min(length, int(seen.max()) + 1), KEY_TILE):
            hi = min(lo + KEY_TILE, length)
            k, v = tile(lo, hi)
            scores = _heads_matmul(rows, k.mT) * scale  # (N, r, t)
            hidden = torch.arange(lo, hi, device=q.device) > seen[:, None]
            scores = scores.masked_fill(hidden, float("-inf"))
            peak = torch.maximum(best, scores.amax(dim=-1, keepdim=True))
            p = (scores - peak).exp()
            kept = (best - peak).exp()
            total = total * kept + p.sum(dim=-1, keepdim=True)
            acc = acc * kept + _heads_matmul(p, v)
            best = peak
        out[at : at + step] = (acc / total).transpose(0, 1)
    return out


def _heads_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, r, x) @ (N or 1, x, y): where all heads share b, as one matrix product."""
    if b.shape[0] == 1:
        return (a.flatten(0, 1) @ b[0]).unflatten(0, a.shape[:2])
    return a @ b
