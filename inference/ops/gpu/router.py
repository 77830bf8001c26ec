"""The router of a mixture-of-experts layer in Triton, as reference.router specifies it: logits and choice, one launch.

Names: T tokens, E experts, H the model's width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.formats import Routing
from ops.gpu import pdl
from ops.gpu.casts import SCALE_BLOCK, dot_operand
from ops.gpu.device import architecture
from ops.gpu.pdl import wait_for_previous
from ops.gpu.tiles import tile_for

LEAST = tl.constexpr(-(2**31))  # less than the key of every float


@triton.jit
def float_to_ordered_int(x):
    """int32 keys in the order of float32 x. Both zeros have one key, and NaN has the greatest, as for torch.topk."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def ordered_int_to_float(key):
    """The inverse of float_to_ordered_int."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def take_best(key, index, NONE: tl.constexpr):
    """Each row's greatest key and its index, the lowest of equals, and the keys without it."""
    best = tl.max(key, axis=1)
    at = tl.min(tl.where(key == best[:, None], index[None, :], NONE), axis=1)
    return best, at, tl.where(index[None, :] == at[:, None], LEAST, key)


@triton.jit(do_not_specialize=["T"])
def router_kernel(
    x_ptr, w_ptr, bias_ptr, weights_ptr, ids_ptr, partial_ptr, counter_ptr, T, H, route_scale,
    E: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    SIGMOID: tl.constexpr, TOP2: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_T tokens by BLOCK_E experts over CHUNK blocks of channels; the last program of a row of tiles to
    arrive adds up its tokens' partial logits, in the order of the channels, and chooses. See reference.route.

    GROUPS > 1: all but the KEPT best groups of experts are left out, a group being worth its best choice, or with TOP2
    the sum of its two best. counter (row tiles,) is zero before and after.
    """
    wait_for_previous()
    SIZE: tl.constexpr = E // GROUPS
    # Experts lie in columns: a group's in a power of two of them, so that groups are rows of a reshaped tile.
    PADDED_GROUPS: tl.constexpr = triton.next_power_of_2(GROUPS)
    PADDED_SIZE: tl.constexpr = triton.next_power_of_2(SIZE)
    COLUMNS: tl.constexpr = PADDED_GROUPS * PADDED_SIZE
    PADDED_K: tl.constexpr = triton.next_power_of_2(TOP_K)

    pid_t, pid_e, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    e = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    h = split * CHUNK * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)
    x_ptrs = x_ptr + tl.minimum(t, T - 1).to(tl.int64)[:, None] * H + h[None, :]
    w_ptrs = w_ptr + tl.minimum(e, E - 1)[:, None] * H + h[None, :]
    acc = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    for i in tl.range(0, CHUNK, num_stages=STAGES):
        inside = (h + i * SCALE_BLOCK < H)[None, :]
        x, w = tl.load(x_ptrs, mask=inside, other=0.0), tl.load(w_ptrs, mask=inside, other=0.0)
        if w.dtype != tl.float32:
            x, w = dot_operand(x, False), dot_operand(w, False)
        acc = tl.dot(w, x.T, acc, input_precision="ieee")
        x_ptrs += SCALE_BLOCK
        w_ptrs += SCALE_BLOCK
    out_ptrs = partial_ptr + (split * T + t).to(tl.int64)[:, None] * E + e[None, :]
    tl.store(out_ptrs, acc.T, mask=(t < T)[:, None] & (e < E)[None, :])

    tl.debug_barrier()  # all of this program's partial logits are written before it reports them
    n_splits = tl.num_programs(2)
    arrived = tl.atomic_add(counter_ptr + pid_t, 1, sem="acq_rel")
    if arrived == tl.num_programs(1) * n_splits - 1:
        tl.store(counter_ptr + pid_t, 0)
        column = tl.arange(0, COLUMNS)
        expert = column // PADDED_SIZE * SIZE + column % PADDED_SIZE
        exists = (column % PADDED_SIZE < SIZE) & (column // PADDED_SIZE < GROUPS)
        group = tl.arange(0, PADDED_GROUPS)
        rank = tl.arange(0, PADDED_K)
        for first in range(0, BLOCK_T, ROWS):
            row = pid_t * BLOCK_T + first + tl.arange(0, ROWS)
            read = (row < T)[:, None] & exists[None, :]
            logits = tl.zeros((ROWS, COLUMNS), tl.float32)
            for s in tl.range(0, n_splits, loop_unroll_factor=4):
                ptrs = partial_ptr + (s * T + row).to(tl.int64)[:, None] * E + expert[None, :]
                logits += tl.load(ptrs, mask=read, other=0.0, cache_modifier=".cg")  # past the first-level cache

            if SIGMOID:
                scores = tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1.0 + tl.exp(-logits))
            else:
                peak = tl.max(tl.where(exists[None, :], logits, float("-inf")), axis=1)
                scores = tl.where(exists[None, :], tl.exp(logits - peak[:, None]), 0.0)
                scores = tl.div_rn(scores, tl.broadcast_to(tl.sum(scores, axis=1)[:, None], scores.shape))
            choice = scores
            if bias_ptr is not None:
                choice += tl.load(bias_ptr + expert, mask=exists, other=0.0)[None, :]
            key = tl.where(exists[None, :], float_to_ordered_int(choice), LEAST)

            if GROUPS > 1:
                grouped = tl.reshape(key, (ROWS * PADDED_GROUPS, PADDED_SIZE))
                member = tl.arange(0, PADDED_SIZE)
                worth, _member, rest = take_best(grouped, member, PADDED_SIZE)
                if TOP2:
                    worth = float_to_ordered_int(
                        ordered_int_to_float(worth) + ordered_int_to_float(tl.max(rest, axis=1))
                    )
                worth = tl.reshape(worth, (ROWS, PADDED_GROUPS))
                worth = tl.where((group < GROUPS)[None, :], worth, LEAST)
                # A group's place is the number of groups that beat it, as those of lower number do at a tie.
                here, there = worth[:, :, None], worth[:, None, :]
                earlier = group[None, None, :] < group[None, :, None]
                beaten = (there > here) | ((there == here) & earlier)
                kept = tl.sum(beaten.to(tl.int32), axis=2) < KEPT  # (ROWS, PADDED_GROUPS)
                kept = tl.broadcast_to(kept[:, :, None], (ROWS, PADDED_GROUPS, PADDED_SIZE))
                kept = tl.reshape(kept, (ROWS, COLUMNS))
                key = tl.where(kept, key, LEAST)

            ids = tl.zeros((ROWS, PADDED_K), tl.int32)
            weights = tl.zeros((ROWS, PADDED_K), tl.float32)
            for k in range(TOP_K):
                _, at, key = take_best(key, column, COLUMNS)
                mine = column[None, :] == at[:, None]
                weight = tl.sum(tl.where(mine, scores, 0.0), axis=1)
                chosen = at // PADDED_SIZE * SIZE + at % PADDED_SIZE
                ids = tl.where((rank == k)[None, :], chosen[:, None], ids)
                weights = tl.where((rank == k)[None, :], weight[:, None], weights)
            if NORMALISE:
                total = tl.sum(weights, axis=1) + 1e-20
                weights = tl.div_rn(weights, tl.broadcast_to(total[:, None], weights.shape))
            place = row.to(tl.int64)[:, None] * TOP_K + rank[None, :]
            written = (row < T)[:, None] & (rank < TOP_K)[None, :]
            tl.store(weights_ptr + place, weights * route_scale, mask=written)
            tl.store(ids_ptr + place, ids.to(tl.int64), mask=written)


@dataclass(frozen=True)
class RouterTile:
    """How router_kernel computes: a program's tokens and experts, the most parts that the channels are cut into,
    how many tokens choose at a time, the warps and the pipeline's stages."""

    max_rows: float  # the most tokens it is for
    block_t: int
    block_e: int
    splits: int
    rows: int
    warps: int
    stages: int

    def chunk(self, h: int) -> int:
        """Blocks of 128 channels per program, for a model of width h."""
        return triton.cdiv(triton.cdiv(h, BLOCK_SIZE), self.splits)

    def constexprs(self) -> dict[str, Any]:
        return {"BLOCK_T": self.block_t, "BLOCK_E": self.block_e, "ROWS": self.rows, "STAGES": self.stages}


# With few tokens the weights (3.7 MB in V3) are read by as many programs as there are multiprocessors; the more tokens,
# the fewer parts, as each part's logits are written and read again.
ROUTER = {
    "sm_80": (
        RouterTile(4, 16, 64, 28, 4, 4, 3),
        RouterTile(64, 16, 64, 14, 8, 4, 3),
        RouterTile(512, 32, 64, 4, 8, 4, 3),
        RouterTile(math.inf, 64, 128, 1, 16, 8, 3),
    ),
    "sm_89": (
        RouterTile(4, 16, 64, 28, 4, 4, 3),
        RouterTile(64, 16, 64, 14, 8, 4, 3),
        RouterTile(512, 32, 64, 4, 8, 4, 3),
        RouterTile(math.inf, 64, 64, 1, 16, 8, 3),
    ),
    "gfx942": (
        RouterTile(4, 16, 64, 28, 4, 4, 2),
        RouterTile(64, 16, 64, 14, 8, 4, 2),
        RouterTile(512, 32, 64, 4, 8, 4, 2),
        RouterTile(math.inf, 64, 64, 1, 16, 8, 2),
    ),
}
ROUTER |= {"sm_90": ROUTER["sm_80"], "sm_100": ROUTER["sm_80"]}
ROUTER_FLOAT32 = (RouterTile(math.inf, 16, 32, 8, 8, 4, 2),)  # for comparisons, not for speed


def rule_constexprs(n_experts: int, rule: Routing) -> dict[str, Any]:
    groups = 1 if rule.topk_method == "greedy" else rule.n_groups
    return {
        "E": n_experts, "TOP_K": rule.top_k, "GROUPS": groups, "KEPT": rule.n_limited_groups,
        "SIGMOID": rule.score_func == "sigmoid", "TOP2": rule.topk_method == "noaux_tc", "NORMALISE": rule.normalise,
    }  # fmt: skip


def router(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    rule: Routing,
    invariant: bool = False,
    counters: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.router: x (T, H), w (E, H) both bfloat16 or both float32, bias (E,) float32, to weights (T, K)
    float32 and ids (T, K) int64.

    With `invariant` the channels are cut alike for any T: a token's bits do not depend on the rest of its batch.
    counters, int32 zeros, are zeros again when it has run; if there are none, or too few, they are made, a launch more.
    """
    (n, h), n_experts = x.shape, w.shape[0]
    assert w.shape == (n_experts, h) and x.dtype == w.dtype, (x.shape, x.dtype, w.shape, w.dtype)
    assert x.is_contiguous() and w.is_contiguous() and (bias is None or bias.dtype == torch.float32)
    weights = torch.empty(n, rule.top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(n, rule.top_k, dtype=torch.int64, device=x.device)
    if n:
        table = ROUTER_FLOAT32 if x.dtype == torch.float32 else ROUTER[architecture(x.device)]
        tile = table[0] if invariant else tile_for(table, n)
        chunk = tile.chunk(h)
        grid = triton.cdiv(n, tile.block_t), triton.cdiv(n_experts, tile.block_e), triton.cdiv(h, chunk * BLOCK_SIZE)
        partial = torch.empty(grid[2], n, n_experts, dtype=torch.float32, device=x.device)
        if counters is None or len(counters) < grid[0]:
            counters = torch.zeros(grid[0], dtype=torch.int32, device=x.device)
        router_kernel[grid](
            x, w, bias, weights, ids, partial, counters, n, h, rule.route_scale,
            CHUNK=chunk, **rule_constexprs(n_experts, rule), **tile.constexprs(), num_warps=tile.warps,
            **pdl.options(architecture(x.device)),
        )  # fmt: skip
    return weights, ids
