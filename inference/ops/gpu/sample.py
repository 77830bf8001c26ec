"""Sampling in Triton, as distributions.sample specifies it: one launch for all rows, one program a row, and no sort.

A token weighs exp((x - peak) / T), the likeliest ONE, as an integer: sums of integers are the same in any order, so
that a row's token depends on nothing else in its batch. What a cut leaves is told by its least likely token, `last`:
all that are likelier stay, and of its equals the first few. `last` is narrowed down between two keys, integers in the
order of the logits, by what is above a few keys between them; a block of tokens without a key there costs little.

Names: V tokens of the vocabulary; keys as router.float_to_ordered_int makes them.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from core.devices import upload
from ops.distributions import Field, SamplingMetadata
from ops.gpu import pdl
from ops.gpu.device import architecture
from ops.gpu.pdl import wait_for_previous
from ops.gpu.router import float_to_ordered_int, ordered_int_to_float

ONE = tl.constexpr(float(1 << 44))  # of 2**18 tokens all weights fit an int64
MOST_TOKENS = 1 << 18
ROW, TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM, DRAFT, ACCEPT, DRAWN_FROM = (tl.constexpr(int(f)) for f in Field)
LOG2_E = tl.constexpr(math.log2(math.e))
LEAST_SCALE, GREATEST_SCALE = tl.constexpr(1.2e-38), tl.constexpr(3e38)  # with which no product of -inf or 0 is NaN


@triton.jit
def load_logits(x_ptr, i, V, finite):
    """Those of tokens i; of a row that is not finite all are 0."""
    return tl.where(i < V, tl.where(finite, tl.load(x_ptr + i, mask=i < V, other=0.0), 0.0), float("-inf"))


@triton.jit
def weigh(x, peak, scale):
    """int64 weights of logits x; 0 where they are below 2**-44 of the likeliest."""
    return (tl.exp2((x - peak) * scale) * ONE).to(tl.int64)


@triton.jit
def kept_weights(x, i, peak, scale, last, last_at, least_weight):
    """Weights of tokens i with logits x; 0 of those cut off."""
    key, weight = float_to_ordered_int(x), weigh(x, peak, scale)
    kept = ((key > last) | ((key == last) & (i <= last_at))) & (weight >= least_weight)
    return tl.where(kept, weight, 0)


@triton.jit
def narrow(
    x_ptr, V, finite, peak, scale, low, full, target,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The greatest key that tokens of together `target` or more are at or above, what these are, and what those above
    it are: weights or, with COUNT, numbers. Those at or above `low` are `full`, which is at least `target`.

    Of the keys that are tried one is in the middle, which bounds the passes by 32; the logits of the others are equally
    far apart, which makes them few.
    """
    high = float_to_ordered_int(peak)
    above = full - full
    way = tl.arange(0, WAYS)
    part = way.to(tl.float32) / WAYS
    while low < high:
        between = ordered_int_to_float(low) * (1 - part) + ordered_int_to_float(high) * part
        tried = tl.minimum(tl.maximum(float_to_ordered_int(between), low + 1), high)
        tried = tl.where(way == 0, (low & high) + ((low ^ high) >> 1) + 1, tried)
        found = tl.zeros((WAYS,), tl.int64)
        least, greatest = high, low
        for at in tl.range(0, V, BLOCK, num_stages=STAGES):
            x = load_logits(x_ptr, at + tl.arange(0, BLOCK), V, finite)
            key = float_to_ordered_int(x)
            inside = (key >= low) & (key <= high)
            if tl.max(inside.to(tl.int32)) > 0:
                weight = inside.to(tl.int64)
                if not COUNT:
                    weight = tl.where(inside, weigh(x, peak, scale), 0)
                found += tl.sum(tl.where(key[None, :] >= tried[:, None], weight[None, :], 0), axis=1)
                least = tl.minimum(least, tl.min(tl.where(inside, key, high)))
                greatest = tl.maximum(greatest, tl.max(tl.where(inside, key, low)))
        found += above
        enough = found >= target
        full = tl.min(tl.where(enough, found, full))
        above = tl.max(tl.where(enough, above, found))
        low = tl.maximum(tl.max(tl.where(enough, tried, low)), least)
        high = tl.minimum(tl.min(tl.where(enough, high, tried - 1)), greatest)
    return low, full, above


@triton.jit
def find_cut(
    x_ptr, V, finite, peak, scale, top_k, top_p, min_p,
    BLOCK: tl.constexpr, WAYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What top_k, top_p and min_p leave of a row: the key of the least likely token, the last index at which one as
    likely stays, the least weight, and the weight of all."""
    weights, strong = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64)
    positive, least = tl.zeros((BLOCK,), tl.int32), tl.full((BLOCK,), float("inf"), tl.float32)
    least_weight = (min_p * ONE).to(tl.int64)
    for at in tl.range(0, V, BLOCK, num_stages=STAGES):
        x = load_logits(x_ptr, at + tl.arange(0, BLOCK), V, finite)
        weight = weigh(x, peak, scale)
        weights += weight
        strong += tl.where(weight >= least_weight, weight, 0)
        positive += (weight > 0).to(tl.int32)
        least = tl.minimum(least, tl.where(weight > 0, x, float("inf")))
    mass = tl.sum(weights)
    last, full = float_to_ordered_int(tl.min(least)), mass
    n_last, n_equal = full - full, full - full  # of the tokens as likely as the last: how many stay, of how many

    count = tl.sum(positive).to(tl.int64)
    if top_k < count:
        last, at_least, likelier = narrow(
            x_ptr, V, finite, peak, scale, last, count, top_k, COUNT=True, BLOCK=BLOCK, WAYS=WAYS, STAGES=STAGES
        )
        n_last, n_equal = top_k - likelier, at_least - likelier
        weights = tl.zeros((BLOCK,), tl.int64)
        for at in tl.range(0, V, BLOCK, num_stages=STAGES):
            x = load_logits(x_ptr, at + tl.arange(0, BLOCK), V, finite)
            weights += tl.where(float_to_ordered_int(x) > last, weigh(x, peak, scale), 0)
        above, each = tl.sum(weights), weigh(ordered_int_to_float(last), peak, scale)
        mass, full = above + n_last * each, above + n_equal * each
    if top_p < 1:
        target = tl.maximum(tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64), 1)
        target = tl.minimum(target, mass)
        last, full, above = narrow(
            x_ptr, V, finite, peak, scale, last, full, target, COUNT=False, BLOCK=BLOCK, WAYS=WAYS, STAGES=STAGES
        )
        each = weigh(ordered_int_to_float(last), peak, scale)
        n_last, n_equal = (target - above + each - 1) // each, (full - above) // each
        mass = above + n_last * each

    last_at, seen = V, full - full
    if n_last < n_equal:
        for at in tl.range(0, V, BLOCK, num_stages=STAGES):
            i = at + tl.arange(0, BLOCK)
            equal = (float_to_ordered_int(load_logits(x_ptr, i, V, finite)) == last).to(tl.int64)
            n = tl.sum(equal)
            if (seen < n_last) & (seen + n >= n_last):
                last_at = tl.max(tl.where((equal > 0) & (seen + tl.cumsum(equal) == n_last), i, 0))
            seen += n
    # Each cut leaves the likeliest, so that of two the one that leaves less is in the other.
    return last, last_at, least_weight, tl.minimum(mass, tl.sum(strong))


@triton.jit
def share(weight, mass):
    """Weights as parts of a whole, float32."""
    return weight.to(tl.float32) * (1.0 / mass.to(tl.float64)).to(tl.float32)


@triton.jit
def beyond_draft(weight, mass, q_ptr, i, V, draft, certain):
    """What tokens i have of max(p - q, 0), as weights. q is all on the draft where that is `certain`."""
    q = tl.load(q_ptr + i, mask=(i < V) & (certain == 0), other=0.0)
    q = tl.where(certain != 0, (i == draft).to(tl.float32), q)
    return tl.maximum((share(weight, mass) * ONE).to(tl.int64) - (q * ONE).to(tl.int64), 0)


@triton.jit(do_not_specialize=["choice_stride"])
def sample_kernel(
    logits_ptr, choice_ptr, table_ptr, drawn_from_ptr, found_ptr, q_ptr, V, stride, choice_stride,
    DRAFTS: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Row n of the table: found (3, rows) int64 whether the row of logits is finite, whether its draft is accepted, and
    its token; with KEEP the distribution (V,) float32 in row n of q."""
    wait_for_previous()
    row, rows = tl.program_id(0), tl.num_programs(0)
    table_ptr += row
    at_row = tl.load(table_ptr + ROW * rows).to(tl.int64)
    temperature, uniform = tl.load(table_ptr + TEMPERATURE * rows), tl.load(table_ptr + UNIFORM * rows)
    x_ptr = logits_ptr + at_row * stride
    finite = tl.load(choice_ptr + at_row) != 0
    best = tl.load(choice_ptr + choice_stride + at_row)
    token = tl.where(finite, best, 0)
    accepted = token * 0
    if DRAFTS:
        draft = tl.load(table_ptr + DRAFT * rows).to(tl.int64)
        accepted = (token == draft).to(tl.int64)
    if (temperature > 0) & (finite | KEEP):
        scale = tl.minimum(tl.maximum((1.0 / temperature) * LOG2_E, LEAST_SCALE), GREATEST_SCALE).to(tl.float32)
        peak = tl.where(finite, tl.load(x_ptr + best), 0.0)
        top_k, top_p = tl.load(table_ptr + TOP_K * rows).to(tl.int64), tl.load(table_ptr + TOP_P * rows)
        last, last_at, least_weight, mass = find_cut(
            x_ptr, V, finite, peak, scale, top_k, top_p, tl.load(table_ptr + MIN_P * rows), BLOCK, WAYS, STAGES
        )
        accepted = token * 0
        rest, whole = accepted, mass  # whether max(p - q, 0) is drawn from, and what it adds up to
        if DRAFTS:
            drawn_from = tl.load(table_ptr + DRAWN_FROM * rows).to(tl.int64)
            certain = (drawn_from < 0).to(tl.int64)
            drawn_from_ptr += drawn_from * V
            if draft >= 0:
                of_draft = tl.where(finite, tl.load(x_ptr + draft), 0.0)
                p = share(kept_weights(of_draft, draft, peak, scale, last, last_at, least_weight), mass)
                q = tl.load(drawn_from_ptr + draft, mask=certain == 0, other=1.0)
                accepted = (tl.load(table_ptr + ACCEPT * rows) * q < p).to(tl.int64)
                if accepted == 0:
                    weights = tl.zeros((BLOCK,), tl.int64)
                    for at in tl.range(0, V, BLOCK, num_stages=STAGES):
                        i = at + tl.arange(0, BLOCK)
                        x = load_logits(x_ptr, i, V, finite)
                        weight = kept_weights(x, i, peak, scale, last, last_at, least_weight)
                        weights += beyond_draft(weight, mass, drawn_from_ptr, i, V, draft, certain)
                    if tl.sum(weights) > 0:  # p = q up to rounding: any draw from p will do
                        rest, whole = accepted + 1, tl.sum(weights)

        if accepted == 0:
            passed = tl.minimum((uniform * whole.to(tl.float64)).to(tl.int64), whole - 1)
            so_far = whole - whole
            for at in tl.range(0, V, BLOCK, num_stages=STAGES):
                i = at + tl.arange(0, BLOCK)
                x = load_logits(x_ptr, i, V, finite)
                weight = kept_weights(x, i, peak, scale, last, last_at, least_weight)
                if KEEP:
                    tl.store(q_ptr + row.to(tl.int64) * V + i, share(weight, mass), mask=i < V)
                if DRAFTS:
                    beyond = beyond_draft(weight, mass, drawn_from_ptr, i, V, draft, certain)
                    weight = tl.where(rest > 0, beyond, weight)
                n = tl.sum(weight)
                if (so_far <= passed) & (passed < so_far + n):
                    token = tl.min(tl.where(so_far + tl.cumsum(weight) > passed, i, V)).to(tl.int64)
                so_far += n
    tl.store(found_ptr + row, finite.to(tl.int64))
    tl.store(found_ptr + rows + row, accepted)
    tl.store(found_ptr + 2 * rows + row, token)


TILES = {  # by architecture: tokens at a time, keys tried at a time, stages of loads, and warps
    **dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_100"), (2048, 8, 4, 16)), "gfx942": (2048, 4, 2, 8),
}  # fmt: skip


def sample_tile(arch: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Constants and options of a launch."""
    block, ways, stages, warps = TILES[arch]
    return {"BLOCK": block, "WAYS": ways, "STAGES": stages}, {"num_warps": warps} | pdl.options(arch)


def sample(
    logits: torch.Tensor, choice: torch.Tensor, metadata: SamplingMetadata, keep: bool = False
) -> tuple[torch.Tensor, list[Any]]:
    """As distributions.sample. Kept distributions are float32, each a tensor (rows, V) and a row's number there."""
    (_, vocab), (_, rows), device = logits.shape, metadata.table.shape, logits.device
    q = torch.empty(rows, vocab, dtype=torch.float32, device=device) if keep else None
    drawn_from = _joined(metadata, logits) if metadata.drawn_from else None
    found = launch(logits, choice, upload(metadata.table, torch.float64, device), drawn_from, q)
    return found, [(q, n) for n in range(rows)] if keep else []


def launch(
    logits: torch.Tensor,
    choice: torch.Tensor,
    table: torch.Tensor,
    drawn_from: torch.Tensor | None = None,
    q: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel alone, for a table (9, rows) on the device: found (3, rows). drawn_from (n, V): what drafts were drawn
    from, by the table's numbers; q (rows, V): where to keep what tokens are. Both are float32."""
    (_, vocab), (_, rows) = logits.shape, table.shape
    assert vocab <= MOST_TOKENS and logits.dtype == torch.float32, (logits.shape, logits.dtype)
    assert logits.stride(1) == choice.stride(1) == 1, (logits.stride(), choice.stride())
    found = torch.empty(3, rows, dtype=torch.int64, device=logits.device)
    tile, options = sample_tile(architecture(logits.device))
    if rows:
        sample_kernel[(rows,)](
            logits, choice, table, drawn_from, found, q, vocab, logits.stride(0), choice.stride(0),
            DRAFTS=drawn_from is not None, KEEP=q is not None, **tile, **options,
        )  # fmt: skip
    return found


def _joined(metadata: SamplingMetadata, none: torch.Tensor) -> torch.Tensor:
    """The tensors with the distributions of drafts as one; writes into the table in which rows they are. `none` where
    no draft was drawn."""
    first: dict[int, int] = {}
    tensors: list[torch.Tensor] = []
    for one in metadata.drawn_from:
        if one is not None and id(one[0]) not in first:
            first[id(one[0])] = sum(map(len, tensors))
            tensors.append(one[0])
    at = (-1 if one is None else first[id(one[0])] + one[1] for one in metadata.drawn_from)
    metadata.table[Field.DRAWN_FROM] = list(at)
    return torch.cat(tensors) if len(tensors) > 1 else (tensors or [none])[0]
