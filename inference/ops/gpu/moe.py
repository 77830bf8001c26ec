"""The experts of a mixture-of-experts layer in Triton, as reference.py specifies them: by sort.py and grouped_gemm.py,
and the weighted sum.

Every shape depends on the number of tokens alone and nothing is read back to the host, so that a CUDA graph can record
the layer.

A layer in W8A8 whose input is quantised takes 6 launches, whatever the number of tokens and experts: the router, sort,
grouped_gemm up, fused.silu_mul, grouped_gemm down, combine. With few assignments (SORTED_IN_PLACE) the first product
finds the rows itself, and the shared expert is one more expert, of every token: 5 launches. Otherwise the shared
experts run at the same time on a second stream.

Names: T tokens, K experts a token, E experts, H the model's width. The assignment a = t * K + k is token t's k-th
expert.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl

from ops.formats import Quantised, Weight
from ops.gpu import fused, pdl, tiles
from ops.gpu.casts import cast
from ops.gpu.device import architecture
from ops.gpu.grouped_gemm import (
    SORTED_IN_PLACE,
    grouped_gemm,
    grouped_gemm_in_place,
    grouped_gemm_of_found,
    grouped_tiles,
    is_alike,
)  # fmt: skip
from ops.gpu.ordered_gemm import can_order, gather_rows, grouped_gemm_in_order
from ops.gpu.pdl import wait_for_previous
from ops.gpu.quantisation import act_quant
from ops.gpu.sort import sort
from ops.gpu.tiles import split_for_few_rows, tile_for


def quantised_for(w: Weight, x: torch.Tensor) -> torch.Tensor | Quantised:
    """x, quantised if w's product is W8A8."""
    return Quantised(*act_quant(x, scale_fmt=w.scale_fmt), dtype=x.dtype) if w.fp8 else x


# --------------------------------------------------------------------------------------------------------------------
# Combine
# --------------------------------------------------------------------------------------------------------------------

COMBINE_COLUMNS = 512  # of a token to a program


@triton.jit(do_not_specialize=["first", "n_local"])
def combine_kernel(
    y_ptr, weights_ptr, ids_ptr, shared_ptr, out_ptr, H, first, n_local, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    """BLOCK_H columns of one token. See reference.combine."""
    wait_for_previous()
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        a = t * TOP_K + k
        local = tl.load(ids_ptr + a) - first
        here = (local >= 0) & (local < n_local)  # other assignments have no row: nothing wrote it
        y = tl.load(y_ptr + a * H + h, mask=(h < H) & here, other=0.0).to(tl.float32)
        acc += tl.load(weights_ptr + a, mask=here, other=0.0) * y
    if shared_ptr is not None:
        acc += tl.load(shared_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * H + h, cast(acc, out_ptr.dtype.element_ty), mask=h < H)


def combine(
    y: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, first: int, n_local: int, shared: torch.Tensor | None
) -> torch.Tensor:
    """As reference.combine."""
    (n, top_k), h = ids.shape, y.shape[1]
    assert y.shape == (n * top_k, h) and weights.shape == ids.shape and weights.dtype == torch.float32
    assert shared is None or shared.shape == (n, h)
    assert all(t is None or t.is_contiguous() for t in (y, weights, ids, shared))
    out = torch.empty(n, h, dtype=y.dtype, device=y.device)
    if out.numel():
        combine_kernel[(n, triton.cdiv(h, COMBINE_COLUMNS))](
            y, weights, ids, shared, out, h, first, n_local, TOP_K=top_k, BLOCK_H=COMBINE_COLUMNS,
            **pdl.options(architecture(y.device)),
        )  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------------------------


def experts(
    x: torch.Tensor | Quantised,
    weights: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    w13: Weight,
    w2: Weight,
    inter: int,
    shared: Callable[[], torch.Tensor] | None = None,
    n_experts: int | None = None,
    invariant: bool = False,
    shared_weights: tuple[Weight, Weight] | None = None,
) -> torch.Tensor:
    """As ReferenceBackend.experts. With `invariant` the tile is the same for any T and K is not split, so that a
    token's bits do not depend on the rest of its batch."""
    (n_local, n), k = w13.data.shape[:2], (x if isinstance(x, torch.Tensor) else x.q).shape[1]
    (tokens, top_k), arch = ids.shape, architecture(weights.device)
    table = grouped_tiles(w13, weights.device)
    rows = ids.numel() / (n_experts or n_local)  # of an expert, in the mean
    tile = up_tile = table[0] if invariant else tile_for(table, math.ceil(rows))
    in_place = tile is table[0] and bool(w13.fp8 and w2.fp8) and 0 < ids.numel() <= SORTED_IN_PLACE
    own13 = own2 = None
    if in_place and not invariant and shared and shared_weights and all(map(is_alike, shared_weights, (w13, w2))):
        own13, own2 = shared_weights
    if tile is table[0] and not invariant:
        more = triton.cdiv(tokens, tile.block_m) if own13 else 0
        up_tile = split_for_few_rows(tile, rows * n_local + more, n_local + more, n, k, arch)
    join = run_on_side_stream(shared, weights.device) if shared and own13 is None else None
    if isinstance(x, torch.Tensor):
        x = quantised_for(w13, x)
    elif not w13.fp8:
        assert x.x is not None, "activations that are only there quantised, by weights that take plain ones"
        x = x.x
    if in_place:
        assert isinstance(x, Quantised)
        gate_up, found = grouped_gemm_in_place(x, w13, own13, ids, first, up_tile)
        z = fused.silu_mul(gate_up, inter, w2.fp8)
        assert isinstance(z, Quantised)
        y = grouped_gemm_of_found(z, w2, own2, found, ids, tile)
    elif isinstance(x, Quantised) and can_order(x, w13, tile) and inter % 16 == 0 and ids.numel():
        order, row_tiles = sort(ids, first, n_local, tile.block_m)
        gate_up = grouped_gemm_in_order(gather_rows(x, order, row_tiles, top_k, tile.block_m), w13, row_tiles, tile)
        z = fused.silu_mul(gate_up, inter, w2.fp8)
        assert isinstance(z, Quantised)
        y = grouped_gemm_in_order(z, w2, row_tiles, tile, order)
    else:
        tile, up_tile = (tiles.without_tma(table, one) for one in (tile, up_tile))
        order, row_tiles = sort(ids, first, n_local, tile.block_m)
        gate_up = grouped_gemm(x, w13, order, row_tiles, top_k, up_tile)
        y = grouped_gemm(fused.silu_mul(gate_up, inter, w2.fp8), w2, order, row_tiles, 1, tile)
    assert isinstance(y, torch.Tensor)
    routed = y[: ids.numel()]
    return combine(routed, weights, ids, first, n_local, join() if join else y[ids.numel() :] if own13 else None)


def run_on_side_stream(work: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """Runs `work` on a second stream of the GPU; the function returned waits for it and returns its result.

    Safe without record_stream, and so under graph capture: the second stream belongs to one first stream, never starts
    before that has come this far, and is joined by it before the result is read. Whatever memory one of them
    frees is therefore written again only after the other has done with it; what `work` reads, the caller must hold.
    """
    if device.type != "cuda":
        return work
    main = torch.cuda.current_stream(device)
    side = side_stream(main)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = work()

    def join() -> torch.Tensor:
        main.wait_stream(side)
        return result

    return join


@cache
def side_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(main.device)
