"""What a rank of a run takes: its memory by part, and the bytes a decode step reads. Arithmetic; nothing is allocated.

Weights are counted from the table in table.py, in the form in which they stay in memory; latents and the tensors of
a step follow model.py, ops.py and the engine as they are. The engine asks here before it loads, and for its page pool.

Sizes are bytes unless said. Letters in comments are model.py's.
"""

import contextlib
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.partition import Partition, choose_experts
from checkpoint.table import Spec, expected_tensors
from core.batch import DECODE_ROWS
from core.config import BLOCK_SIZE, ModelArgs
from core.errors import UserError
from core.numerics import Numerics
from core.run_config import PAGE_SIZE, AskedLayout, ExpertLayout
from engine import graphs
from ops import formats, reference
from ops.cpu import backend as cpu
from ops.cpu import kernels as kernel_cpu
from ops.gpu import tiles

GPU_SHARE = 0.9  # of what weights and a step leave: the rest is for the allocator's gaps and the libraries' own buffers
HOST_SHARE = 0.5  # the same of a host, which others need too
SCORED_ROWS = 256  # rows of prompt logits that exist at one time
# As in kernel_attention.py, which needs Triton; a test holds them equal.
SPLIT_BYTES, SLAB_BYTES, PROGRAMS, DECODE_TILE_ROWS = 256 << 20, 1 << 30, 264, 64
DRAWN_ROWS, SAMPLER_BYTES = 32, 56  # distributions the sampler makes at one time, and what it takes a token of one

EMBEDDING, HEAD, ATTENTION, DENSE = "embedding", "head", "attention", "dense MLPs"
ROUTED, SHARED, SMALL, MTP = "routed experts", "shared experts", "router, norms", "MTP module"
PARTS = (EMBEDDING, HEAD, ATTENTION, DENSE, ROUTED, SHARED, SMALL)


@dataclass(frozen=True)
class RankSpec:
    """One rank of a run, as far as its memory depends on it."""

    args: ModelArgs
    num: Numerics
    ranks: int = 1
    gpu: bool = True  # a GPU's forms of the ops and weights, else a CPU's
    mtp: bool = False  # the MTP module is loaded, whether or not it drafts

    @property
    def experts(self) -> ExpertLayout:
        return self.num.experts

    @property
    def inner(self) -> int:
        """A routed expert's width here."""
        return -(-self.args.moe_inter_dim // (self.ranks if self.experts == "split" else 1))

    @property
    def packs(self) -> bool:
        """All weights are plain, and lie packed as kernel_cpu.c has them."""
        return self.compiled and self.num.gemm is None

    @property
    def compiled(self) -> bool:
        """The ops are kernel_cpu.c's."""
        return not self.gpu and self.num.dtype == torch.bfloat16 and kernel_cpu.library() is not None

    @property
    def share(self) -> float:
        return GPU_SHARE if self.gpu else HOST_SHARE


@dataclass(frozen=True)
class Limits:
    """What a run is asked to hold at a time; the engine's flags, and its defaults."""

    max_model_len: int
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    mtp: int = 0  # tokens drafted a step
    graphs: bool | None = None  # decode steps are recorded; None: in bfloat16 on a GPU

    @property
    def budget(self) -> int:
        """Tokens of the largest forward."""
        return max(self.max_num_batched_tokens, self.max_num_seqs * (1 + self.mtp))

    @property
    def pages(self) -> int:
        """Pages of one sequence of full length, with its drafts."""
        return -(-(self.max_model_len + self.mtp) // PAGE_SIZE)


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """Tensors that are alike: `spec` without its name."""

    mtp: bool
    part: str
    leaf: str  # the last two words of the name
    spec: Spec


@functools.lru_cache(maxsize=4)
def _kinds(args: ModelArgs, quantised: bool, mtp: bool) -> Counter[_Kind]:
    """The table's tensors, counted by kind: thousands where V3 has 92 thousand names."""
    found: Counter[_Kind] = Counter()
    for name, spec in expected_tensors(args, quantised, mtp).items():
        leaf = ".".join(name.split(".")[-2:])
        found[_Kind(name.startswith("mtp."), _part(name, leaf), leaf, spec._replace(hf=""))] += 1
    return found


def _part(name: str, leaf: str) -> str:
    if "norm" in leaf or ".gate." in name:
        return SMALL
    for word, part in ((".attn.", ATTENTION), (".experts.", ROUTED), (".shared_experts.", SHARED), (".ffn.", DENSE),
                       ("embed.", EMBEDDING), ("head.", HEAD)):  # fmt: skip
        if word in name:
            return part
    return MTP


def weight_bytes(rank: RankSpec) -> dict[tuple[bool, str], int]:
    """Every rank's weights as they lie in memory after `prepare`, by (of the MTP module, part); scales are counted
    with what they scale, and the zeros between stacked FP8 projections with the first of them.

    Unlike on disk, wkv_b is never FP8; a CPU packs plain weights, and keeps router and head for products in float32; a
    tied head, and the MTP module's copies of embedding and head, do not exist. The
    packed form is filled up to whole panels.
    """
    found: Counter[tuple[bool, str]] = Counter()
    partition = Partition(rank.args, rank.ranks, rank.experts, rank.num.gemm is not None)
    for kind, n in _kinds(rank.args, rank.num.gemm is not None, rank.mtp).items():
        cut = partition.cut(kind.spec, 0)  # the ranks' parts are equal
        if cut is not None:
            found[kind.mtp, kind.part] += n * _held_bytes(kind, tuple(b - a for a, b in cut), rank)
    return dict(found)


def _held_bytes(kind: _Kind, shape: tuple[int, ...], rank: RankSpec) -> int:
    """What a tensor of which this rank has so much takes in memory; 0 if it is not kept."""
    plain, size = rank.num.dtype.itemsize, math.prod(shape)
    if kind.leaf == "wkv_b.weight":
        return size * plain
    if kind.leaf == "wkv_b.scale" or (kind.mtp and kind.part in (EMBEDDING, HEAD)):
        return 0
    if kind.part == HEAD or kind.leaf == "gate.weight":
        if rank.args.tie_word_embeddings and kind.part == HEAD and (rank.gpu or plain == 4):
            return 0
        if rank.gpu or plain == 4:
            return size * plain
        return 2 * kernel_cpu.packed_numbers(*shape) if rank.compiled else size * 4
    if kind.leaf.endswith((".scale", ".bias")):
        return size * kind.spec.dtype.itemsize
    if kind.spec.dtype == torch.float8_e4m3fn:
        stacked = kind.leaf in ("w1.weight", "w3.weight", "wq_a.weight", "wq.weight")
        return (_in_blocks(shape[0]) if stacked else shape[0]) * shape[1]
    if rank.compiled and len(shape) == 2 and kind.part not in (EMBEDDING, SMALL):
        before = _rows_before(kind.leaf, shape, rank)
        if before is not None:
            return 2 * (kernel_cpu.packed_numbers(before + shape[0], shape[1]) - before * shape[1])
    return size * plain


def _rows_before(leaf: str, shape: tuple[int, ...], rank: RankSpec) -> int | None:
    """Of the projection whose last part a tensor is; None if another part follows, which is filled up for both."""
    if leaf in ("w1.weight", "wq_a.weight", "wq.weight"):
        return None
    if leaf == "wkv_a.weight":
        return rank.args.q_lora_rank or rank.args.n_heads // rank.ranks * rank.args.qk_head_dim
    return shape[0] if leaf == "w3.weight" else 0


def _in_blocks(n: int) -> int:
    return -(-n // BLOCK_SIZE) * BLOCK_SIZE


def parameters(rank: RankSpec, mtp: bool = False) -> int:
    """How many weights the main model has, all ranks' together, or the MTP module alone, whose embedding and head are
    the main model's."""
    kinds = _kinds(rank.args, rank.num.gemm is not None, rank.mtp)
    return sum(n * math.prod(kind.spec.shape) for kind, n in kinds.items()
               if kind.mtp == mtp and kind.spec.required and not kind.leaf.endswith(".scale"))  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Latents
# --------------------------------------------------------------------------------------------------------------------


def latent_bytes(rank: RankSpec, mtp: bool | None = None) -> int:
    """Of one token, all layers together; every rank keeps the same. `mtp` True or False: the MTP module's or the main
    model's alone."""
    args, num = rank.args, rank.num
    width = args.latent_dim * num.dtype.itemsize
    if num.fp8_latents:
        width = formats.packed_latent_bytes(args.kv_lora_rank, args.qk_rope_head_dim)
    layers = (args.n_layers if mtp is not True else 0) + (args.n_mtp_layers if rank.mtp and mtp is not False else 0)
    return layers * width


def page_bytes(rank: RankSpec) -> int:
    return PAGE_SIZE * latent_bytes(rank)


# --------------------------------------------------------------------------------------------------------------------
# A step
# --------------------------------------------------------------------------------------------------------------------


def step_bytes(rank: RankSpec, limits: Limits, decode: bool = False) -> int:
    """The most that one forward's tensors take at a time, beside weights and latents: the largest the limits allow, or
    with `decode` one of max_num_seqs sequences that bring a token and its drafts.

    Counted are the tensors that exist together in the worst place of a layer, or around the logits and the sampler.
    Taken as the worst case: nearly all tokens belong to one sequence, every sequence is at the end of its context, its
    pages are scattered, and all tokens choose the same expert. Left out: what torch's libraries take inside an op.
    """
    args, num = rank.args, rank.num
    tokens = limits.max_num_seqs * (1 + limits.mtp) if decode else limits.budget
    rows = 1 + limits.mtp if decode else tokens  # of one sequence
    hidden = tokens * args.dim * num.dtype.itemsize  # (T, H)
    normed = _given(rank, tokens, args.dim)
    kept = normed + (hidden if num.gemm == "fp8" else 0)  # of the router's input, which it needs as it was
    attention = max(_attention(rank, *batch, limits) for batch in _batches(rank, tokens, rows, limits.max_num_seqs))
    mlp = _mlp(rank, tokens, -(-args.inter_dim // rank.ranks)) if args.n_dense_layers else 0
    moe = _moe(rank, tokens) if args.n_moe_layers or rank.mtp else 0
    # Of the layer: what came into it, in two parts, and their sum; behind attention its result and the next sum. A
    # draft has in the place of the two parts the main model's states and those of them it starts from.
    norm = 5 * hidden + normed + max(kept, _norm(rank, tokens, args.dim))
    layer = 4 * tokens * args.qk_rope_head_dim + max(3 * hidden + max(normed + attention, kept + max(mlp, moe)), norm)
    if limits.mtp:  # combining: the embedding too, both parts' norms and the two as one; or those and the projection
        projection = hidden if rank.gpu else _linear(rank, tokens, 2 * args.dim, args.dim, plain=True)
        most = max(4 * hidden, hidden + _norm(rank, tokens, args.dim), 2 * hidden + projection)
        layer = max(layer, 3 * hidden + most)
    sampled = limits.max_num_seqs * (1 + limits.mtp)
    scored = min(max(sampled, 0 if decode else SCORED_ROWS), tokens)
    logits = 4 * args.vocab_size  # a row, float32
    # a rank's, all ranks', and these in one piece
    gathered = scored * (logits // rank.ranks + 2 * logits if rank.ranks > 1 else logits)
    states = scored * args.dim * (num.dtype.itemsize + (0 if rank.gpu else _float_copy(rank)))
    sampler = sampled * logits + min(sampled, DRAWN_ROWS) * SAMPLER_BYTES * args.vocab_size
    drafts = 8 * limits.max_num_seqs * limits.mtp * args.vocab_size  # the distributions they were drawn from
    return drafts + max(layer, hidden + max(states + gathered, sampler))


def _float_copy(rank: RankSpec) -> int:
    """What x.float() takes a value: nothing where x is float32 already."""
    return 0 if rank.num.dtype == torch.float32 else 4


def _given(rank: RankSpec, rows: int, k: int) -> int:
    """What norm and silu_mul hand to a projection: the values, or in W8A8 the quantised ones and their scales."""
    return rows * k + 4 * rows * -(-k // BLOCK_SIZE) if rank.num.gemm == "fp8" else rows * k * rank.num.dtype.itemsize


def _quantising(rank: RankSpec, rows: int, k: int) -> int:
    """What act_quant takes: a CPU's has a padded float32 copy and another for its result."""
    return 0 if rank.num.gemm != "fp8" else _given(rank, rows, k) if rank.gpu else 10 * rows * _in_blocks(k)


def _linear(rank: RankSpec, rows: int, k: int, n: int, plain: bool = False) -> int:
    """What a product (rows, k) by (n, k) takes beside the input: its result, and what it is made from. `plain`: of a
    weight that is never FP8."""
    out = rows * n * rank.num.dtype.itemsize
    if rank.num.gemm is None or plain:
        return out + 4 * min(rows, kernel_cpu.chunk_rows(k)) * k if rank.compiled else out
    if rank.gpu:  # sums of the parts of K: a part to each multiprocessor, or two
        parts = 2 * max(tiles.PROCESSORS.values()) * 64 * 64 * 4
        return out + (min(4 * tiles.SPLITS[-1] * rows * n, parts) if rows <= tiles.SPLIT_UP_TO else 0)
    return 16 * rows * n  # the sum, the product of 128 channels, its scales, and that scaled


def _norm(rank: RankSpec, rows: int, width: int) -> int:
    """RMSNorm. A CPU's has a float32 copy, and two float32 tensors on the way to the result, if it is not compiled."""
    if rank.gpu:
        return _given(rank, rows, width)
    plain = rows * width * rank.num.dtype.itemsize
    if rank.compiled:
        return plain + max(4 * torch.get_num_threads() * width, _quantising(rank, rows, width))
    return max(rows * width * (_float_copy(rank) + 8), plain + _quantising(rank, rows, width))


def _gate_up(rank: RankSpec, inner: int) -> int:
    """Rows of gate and up stacked."""
    return 2 * (inner if rank.num.gemm is None else _in_blocks(inner))


def _swiglu(rank: RankSpec, rows: int, inner: int) -> int:
    """The product of gate and up, as the next projection takes it, and on a CPU what it is made from, in float32."""
    if rank.gpu:
        return _given(rank, rows, inner)
    plain = rows * inner * rank.num.dtype.itemsize
    if rank.compiled:
        return plain + _quantising(rank, rows, inner)
    return max(rows * inner * (_float_copy(rank) + 4), plain + _quantising(rank, rows, inner))


def _mlp(rank: RankSpec, rows: int, inner: int) -> int:
    """SwiGLU: gate and up in one; their product; the second projection."""
    width = _gate_up(rank, inner)
    second = _given(rank, rows, inner) + _linear(rank, rows, inner, rank.args.dim)
    together = rows * width * rank.num.dtype.itemsize + _swiglu(rank, rows, inner)
    return max(_linear(rank, rows, rank.args.dim, width), together, second)


def _moe(rank: RankSpec, tokens: int) -> int:
    """Router, then this rank's experts and the shared ones."""
    args, b = rank.args, rank.num.dtype.itemsize
    rows, values = tokens * args.n_activated_experts, tokens * args.dim
    width = -(-args.n_shared_experts * args.moe_inter_dim // rank.ranks)
    shared = _mlp(rank, tokens, width) if width else 0
    if rank.gpu:  # the shared experts run on a stream of their own, whose memory no other uses
        routing = 12 * rows + 4 * args.n_routed_experts * max(tokens, 8 * tokens if b == 4 else min(28 * tokens, 2048))
        sorting = 4 * rows + 12 * (min(rows, args.n_routed_experts) + rows // 16)
        gate_up, product = rows * _gate_up(rank, rank.inner) * b, _given(rank, rows, rank.inner)
        routed = gate_up + rows * args.dim * b + max(product, values * b)
        return max(routing, 12 * rows + shared + sorting + routed)
    if rank.compiled:
        multiplying = 4 * min(tokens, kernel_cpu.chunk_rows(args.dim)) * args.dim
        router = 4 * tokens * args.n_routed_experts + max(multiplying, 12 * rows)
    else:
        router = 16 * tokens * args.n_routed_experts + 4 * values + 4 * args.dim
    if rank.packs:  # the routed experts begin when the shared ones are done
        return max(router, 12 * rows + max(shared, b * values * bool(width) + _routed(rank, tokens)))
    chosen = 48 * rows  # ids, weights and their order, int64 and float32
    return max(router, chosen + max(_routed(rank, tokens), values * (4 + b), 4 * values + shared))


def _routed(rank: RankSpec, tokens: int) -> int:
    """A CPU's routed experts: one after another, or several that have few rows, into a float32 sum."""
    args, b = rank.args, rank.num.dtype.itemsize
    values = tokens * args.dim
    if not rank.packs:
        return 4 * values + max(values * b + _mlp(rank, tokens, rank.inner), values * 8)
    together = kernel_cpu.bundle_rows(tokens, args.n_activated_experts)
    return (4 + b) * values + 4 * together * (args.dim + 3 * rank.inner) + 8 * tokens * args.n_activated_experts


def _batches(rank: RankSpec, tokens: int, rows: int, sequences: int) -> Iterator[tuple[int, int]]:
    """(tokens, rows of one sequence) of the batches that may be the worst for attention: of `rows`, or of the most that
    still go through a form for fewer rows."""
    yield tokens, rows
    if rank.gpu and rank.num.dtype == torch.bfloat16:
        bounds = [DECODE_ROWS]
    else:
        bounds = [few_rows(rank.args)] if rank.gpu else [few_rows(rank.args), cpu.TORCH_DECODE_ROWS]
    for few in bounds:
        if few < rows:
            yield min(tokens, few * sequences) if rank.gpu or sequences == 1 else tokens, few


def _attention(rank: RankSpec, tokens: int, rows: int, limits: Limits) -> int:
    """The projections of all tokens, and what lives while their sequences attend, of which the largest has so many
    rows."""
    args, b = rank.args, rank.num.dtype.itemsize
    n, r, dv = -(-args.n_heads // rank.ranks), args.qk_rope_head_dim, args.v_head_dim
    width = args.qk_nope_head_dim + r
    first = args.q_lora_rank or n * width
    stacked = (first if rank.num.gemm is None else _in_blocks(first)) + args.latent_dim
    held = tokens * stacked * b
    into = _linear(rank, tokens, args.dim, stacked)
    if q := args.q_lora_rank:
        projected = _given(rank, tokens, q) + _linear(rank, tokens, q, n * width)
        into = max(into, held + max(_norm(rank, tokens, q), projected))
        held += tokens * n * width * b
    rotated, o = tokens * n * r * b, tokens * n * dv * b
    alone = rank.gpu or (rank.compiled and not rank.num.fp8_latents)
    rotating = 0 if alone else tokens * (n * r * (_float_copy(rank) + 12) + args.latent_dim * (b + 12))
    product = _linear(rank, tokens, n * dv, args.dim)
    quantised = _quantising(rank, tokens, n * dv)
    out = o + (quantised + product if rank.gpu else max(quantised, _given(rank, tokens, n * dv) + product))
    side = _on_cpu if not rank.gpu else _on_gpu if b == 2 else _on_gpu_float32
    attending = side(rank, tokens, rows, n, limits)
    return max(into, held + max(rotating, rotated + max(attending, out)))


def _on_gpu(rank: RankSpec, tokens: int, rows: int, n: int, limits: Limits) -> int:
    """kernel_attention.mla. Few rows of a sequence are decoded, with the keys split up; many attend to keys and values
    that are expanded a slab at a time, and where one slab does not do carry float32 sums along. A batch of both has the
    absorbed queries, and what they came to, while it expands."""
    args, b = rank.args, rank.num.dtype.itemsize
    c, dn, r, dv = args.kv_lora_rank, args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim

    def decoded(few: int) -> tuple[int, int]:
        width = min(DECODE_TILE_ROWS, min(rows, DECODE_ROWS) * n)
        empty = min(few, limits.max_num_seqs) * (width - math.gcd(n, width))  # rows, in the sequences' last tiles
        tiles = (few * n + empty) // width
        split = width * min(tiles * -(-limits.max_model_len // PAGE_SIZE), tiles + PROGRAMS)
        return 2 * few * n * c * b, min(SPLIT_BYTES, 4 * split * c) * (c + 1) // c + 12 * few * n

    if rows <= DECODE_ROWS:
        return tokens * n * dv * b + sum(decoded(tokens))
    absorbed, _ = decoded(min(tokens - rows, DECODE_ROWS * (limits.max_num_seqs - 1)))
    per_key = (n * (dn + dv) + c + r) * b
    keys = min(limits.max_num_seqs, tokens // (DECODE_ROWS + 1)) * limits.max_model_len * per_key
    carried = 4 * tokens * n * (dv + 1) if keys > SLAB_BYTES else 0
    return tokens * n * dv * b + absorbed + min(keys, SLAB_BYTES) + carried


def _on_gpu_float32(rank: RankSpec, tokens: int, rows: int, n: int, limits: Limits) -> int:
    """reference.mla: one sequence at a time, its latents gathered while those of the one before are still there."""
    args, b = rank.args, rank.num.dtype.itemsize
    gathered = limits.max_model_len * args.latent_dim * b
    before = gathered if limits.max_num_seqs > 1 else 0
    form = (_absorbed if rows <= few_rows(args) else _expanded)(rank, rows, n, limits.max_model_len)
    return tokens * n * args.v_head_dim * b + before + max(_unpacking(rank, limits), gathered + form)


def _on_cpu(rank: RankSpec, tokens: int, rows: int, n: int, limits: Limits) -> int:
    """cpu.mla: one sequence's many rows at a time, and all those of few rows together, for which their latents are
    gathered unless a compiled kernel reads the pages."""
    args, b = rank.args, rank.num.dtype.itemsize
    c, r, dv, context = args.kv_lora_rank, args.qk_rope_head_dim, args.v_head_dim, limits.max_model_len
    compiled = rank.compiled and not rank.num.fp8_latents
    gathered = (1 if compiled else min(tokens, limits.max_num_seqs)) * context * (c + r) * b
    few = few_rows(args)
    if rows > few:
        form = _expanded(rank, rows, n, context)
    elif compiled:
        counts = range(1, min(rows, tokens) + 1)  # not the most rows, nor the fewest, need the most scratch
        fit = ((min(limits.max_num_seqs, tokens // each), each) for each in counts)
        return tokens * n * dv * b + max(kernel_cpu.mla_bytes(*many, n, c, r, context) for many in fit)
    elif rows > cpu.TORCH_DECODE_ROWS:
        form = _absorbed(rank, rows, n, context)
    else:  # queries, and results of all with those of one; the last has its copy of the queries and its mask
        mask = rows * context * (n * (1 + b)) if rows > 1 else 0
        form = tokens * n * b * (3 * c + r + max(r, dv)) + rows * n * (c + r) * b + mask
    return tokens * n * dv * b + gathered + max(_unpacking(rank, limits), form)


def few_rows(args: ModelArgs) -> int:
    """reference.absorbed_rows."""
    c, both = args.kv_lora_rank, args.qk_nope_head_dim + args.v_head_dim
    saved = 2 * c - both
    return c * both // saved if saved > 0 else 1 << 30


def _unpacking(rank: RankSpec, limits: Limits) -> int:
    """reference.unpack_latents of one sequence, beside its result."""
    c = rank.args.kv_lora_rank
    packed = formats.packed_latent_bytes(c, rank.args.qk_rope_head_dim)
    return limits.max_model_len * (12 * c + 2 * packed) if rank.num.fp8_latents else 0


def _absorbed(rank: RankSpec, rows: int, n: int, context: int) -> int:
    """reference.mla_absorbed: queries in the latent space, one tile of keys for all heads."""
    args, b = rank.args, rank.num.dtype.itemsize
    c, r = args.kv_lora_rank, args.qk_rope_head_dim
    queries = rows * n * (c + r) * b
    return queries + 4 * rows * n * c + _attend(rows, n, c + r, c, 1, context, _float_copy(rank) > 0)


def _expanded(rank: RankSpec, rows: int, n: int, context: int) -> int:
    """reference.mla_expanded, a tile of keys and values at a time, or cpu.mla_expanded, all at once."""
    args, b = rank.args, rank.num.dtype.itemsize
    c, dn, r, dv = args.kv_lora_rank, args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim
    width = dn + r
    queries = rows * n * width * b
    wide = 4  # what the products are made in
    keys = context * n * width * wide
    if not rank.gpu and dv <= width and 2 * keys <= cpu.EXPANDED_BYTES:
        copies = wide > b  # of all that comes in
        mask = rows * context * (1 + wide) if rows < context else 0
        values = context * n * dv * wide + n * dv * c * wide * copies  # before they are padded to the keys' width
        results = queries + queries // b * wide * copies + mask + queries // b * wide
        return context * (c + r) * wide * copies + 2 * keys + max(values, results)
    return queries + rows * n * dv * 4 + _attend(rows, n, width, dv, n, context, _float_copy(rank) > 0)


def _attend(rows: int, n: int, d: int, dv: int, key_heads: int, context: int, copies: bool) -> int:
    """reference._attend without its result: float32 queries, a tile of keys and values, scores and sums. Those of the
    tile before live until the next ones take their names."""
    tile = min(context, reference.KEY_TILE)
    tiles = 2 if context > tile else 1
    at_once = min(rows, max(1, reference.SCORE_TILE // (n * reference.KEY_TILE)))
    queries = 4 * at_once * n * d * (copies + (key_heads == 1))  # one more where all heads share the keys
    narrow = 2 * n * tile * (d + dv) * copies if key_heads > 1 else 0  # bfloat16, before they are widened
    keys = 4 * key_heads * tile * (d + dv) if key_heads > 1 else 4 * tile * d * copies
    scores = 4 * at_once * n * tile
    sums = 4 * at_once * n * dv
    making = tiles * keys + narrow + 2 * (tiles - 1) * scores
    return queries + sums + max(making, keys + max((2 + tiles) * scores, 2 * scores + 3 * sums))


# --------------------------------------------------------------------------------------------------------------------
# What fits
# --------------------------------------------------------------------------------------------------------------------


class MemoryBudget(NamedTuple):
    """What a rank must have."""

    weights: int
    packing: int  # beside the weights, before there is a cache
    step: int
    graphs: int
    cache: int
    kept: int  # what the cache must leave free

    @property
    def total(self) -> int:
        return self.weights + max(self.packing, self.step + self.graphs + self.cache + self.kept)


def need(rank: RankSpec, limits: Limits, cache: int | None = None) -> MemoryBudget:
    """With a cache of so many bytes, which somebody chose, or one for a sequence of full length, beside which the
    rank's share of memory stays free. A CPU packs its weights, one projection or stack of experts at a time."""
    parts = weight_bytes(rank)
    kept = 0
    if cache is None:
        cache = limits.pages * page_bytes(rank)
        kept = math.ceil(cache / rank.share) - cache
    return MemoryBudget(
        sum(parts.values()), _packing(rank, parts), step_bytes(rank, limits), _graphs(rank, limits), cache, kept
    )


def _packing(rank: RankSpec, parts: dict[tuple[bool, str], int]) -> int:
    """What packing the largest weight takes beside all weights as they are before or, if that is more, after it."""
    args, plain = rank.args, rank.num.dtype.itemsize
    if rank.gpu or plain == 4:
        return 0
    head = (plain if rank.compiled else 4) * args.vocab_size // rank.ranks * args.dim
    if not rank.packs:
        return head
    largest = max(head, 2 * plain * args.inter_dim // rank.ranks * args.dim)
    in_place = all(n % kernel_cpu.panel_width() == 0 for n in (2 * rank.inner, args.dim))
    if args.n_moe_layers and not in_place:
        largest = max(largest, parts[False, ROUTED] // args.n_moe_layers * 2 // 3)  # w1 and w3 lie together
    return largest


def _graphs(rank: RankSpec, limits: Limits) -> int:
    """What recorded decode steps keep to themselves: a page; the tensors of the largest step; and of each number of
    sequences its result and the facts that are copied into it; once for the main model, and for each way to draft."""
    if not (graphs.records(rank.gpu, rank.num.dtype) if limits.graphs is None else limits.graphs):
        return 0
    width = 1 + limits.mtp
    recorded = [width, *({1, width} if limits.mtp > 1 else {width} if limits.mtp else ())]
    state = rank.args.dim * rank.num.dtype.itemsize
    most = limits.max_num_seqs
    kept = most * width * state
    for tokens in recorded:
        kept += sum(graphs.sizes(most)) * (tokens * state + 8 * (3 * tokens + 1 + limits.pages))
    return page_bytes(rank) + kept + step_bytes(rank, limits, decode=True)


def pages_that_fit(rank: RankSpec, limits: Limits, free: int, shrink: bool = False) -> int:
    """Pages of latents for which `free` bytes beside the weights have room, after a step's tensors; 0 if none.

    A shorter context needs less for a step: with `shrink` it may be as much shorter as makes it fit.
    """

    def room(length: int) -> int:
        wanted = need(rank, replace(limits, max_model_len=length))
        return max(int((free - wanted.step - wanted.graphs) * rank.share) // page_bytes(rank), 0)

    pages = room(limits.max_model_len)
    if pages >= limits.pages or not shrink:
        return pages
    most = _most(limits.pages, lambda p: room(p * PAGE_SIZE) >= p)
    return room(most * PAGE_SIZE) if most else 0


def _most(n: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to n that fits, where all smaller ones do; 0 if none does."""
    low = 0
    while low < n:
        middle = (low + n + 1) // 2
        low, n = (middle, n) if fits(middle) else (low, middle - 1)
    return low


def check_fits(rank: RankSpec, limits: Limits, free: int, cache: int | None = None, shrink: bool = False) -> None:
    """Raises UserError, naming what would help, when `free` bytes cannot hold the weights, a step and the smallest
    useful cache: one sequence of the length asked for; with `shrink`, which leaves the length open, one page; or
    `cache` bytes where somebody asks for them.
    """
    if shrink:
        limits = replace(limits, max_model_len=max(PAGE_SIZE - limits.mtp, 2))

    def fits(rank: RankSpec, limits: Limits = limits) -> bool:
        return need(rank, limits, cache).total <= free

    if fits(rank):
        return
    wanted = need(rank, limits, cache)
    lines = [f"weights {gb(wanted.weights)}"]
    if wanted.total == wanted.weights + wanted.packing:
        lines.append(f"packing them {gb(wanted.packing)}")
    else:
        what = "of one page" if shrink else f"of {limits.max_model_len} tokens"
        lines.append(f"a step {gb(wanted.step + wanted.graphs)}")
        lines.append(f"latents {what if cache is None else 'as asked'} {gb(wanted.cache)}")
        lines += [f"kept free {gb(wanted.kept)}"] if wanted.kept else []
    ways = []
    others = (with_ranks(rank, n) for n in range(rank.ranks + 1, rank.args.n_heads + 1))
    if more := next((other for other in others if partition_error(other) is None and fits(other)), None):
        ways.append(f"{more.ranks} ranks with as much memory each")
    if cache is not None:
        tenths = (free - need(rank, limits, 0).total) * 10 // 2**30
        ways += [f"--kv-cache-gib {tenths / 10}"] if tenths > 0 else []
    else:
        fp8 = replace(rank, num=replace(rank.num, fp8_latents=True))
        ways += ["--kv-cache-dtype fp8"] if not rank.num.fp8_latents and fits(fp8) else []
        pages = 0 if shrink else (limits.max_model_len - 1) // PAGE_SIZE
        pages = _most(pages, lambda p: fits(rank, replace(limits, max_model_len=p * PAGE_SIZE)))
        ways += [f"--max-model-len {pages * PAGE_SIZE}"] if pages else []
    raise UserError(f"a rank needs {gb(wanted.total)} of memory and {gb(free)} are free ({', '.join(lines)}); "
                    f"{' or '.join(ways) or 'more memory'} would do")  # fmt: skip


def with_ranks(rank: RankSpec, ranks: int, asked: AskedLayout = "auto") -> RankSpec:
    """The same run on another number of ranks."""
    experts, _ = choose_experts(rank.args, ranks, asked)
    return replace(rank, ranks=ranks, num=replace(rank.num, experts=experts))


def partition_error(rank: RankSpec) -> str | None:
    """Why the model does not divide over its ranks, in Partition's words; None if it does."""
    try:
        Partition(rank.args, rank.ranks, rank.experts, rank.num.gemm is not None)
    except UserError as e:
        return re.sub(r" \(it works with [^)]*\)", "", str(e))
    return None


def gb(n: float) -> str:
    return f"{n / 1e9:.2f} GB"


# --------------------------------------------------------------------------------------------------------------------
# What a decode step reads
# --------------------------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """What a rank reads in one decode step of all sequences."""

    experts: float  # different routed experts of a layer, of all ranks together, that the tokens choose
    weights: int
    latents: int


def distinct_experts(args: ModelArgs, tokens: int) -> float:
    """How many of E experts so many tokens are expected to choose, each K of them evenly: E (1 - (1 - K/E)^tokens)."""
    e = args.n_routed_experts
    return e * (1 - (1 - args.n_activated_experts / e) ** tokens) if e else 0.0


def decode_reads(rank: RankSpec, sequences: int, context: int, drafts: int = 0) -> Read:
    """Every weight once but for the embedding, routed experts as far as somebody chooses them, and the latents of
    `context` tokens a sequence. With whole experts per rank this is the mean rank; a step waits for the busiest.

    With drafts, each sequence brings 1 + drafts tokens; the MTP module and the head run once more for each draft, the
    module first on all those tokens.
    """
    args, parts = rank.args, weight_bytes(rank)

    def read(mtp: bool, tokens: int) -> float:
        chosen = distinct_experts(args, tokens) / args.n_routed_experts if args.n_routed_experts else 0.0
        return sum(n * (chosen if part == ROUTED else 1) for (of_mtp, part), n in parts.items()
                   if of_mtp == mtp and part != EMBEDDING)  # fmt: skip

    tokens = sequences * (1 + drafts)
    total = read(False, tokens)
    head = parts.get((False, HEAD), 0) or parts[False, EMBEDDING]
    if not parts.get((False, HEAD)):
        total += head
    for draft in range(drafts):
        total += read(True, sequences if draft else tokens) + head
    latents = sequences * context * (latent_bytes(rank, mtp=False) + drafts * latent_bytes(rank, mtp=True))
    return Read(distinct_experts(args, tokens), round(total), latents)


# --------------------------------------------------------------------------------------------------------------------
# What there is
# --------------------------------------------------------------------------------------------------------------------


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that programs may take without swapping, by the kernel's estimate; 4 GiB where it makes none."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 << 30
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


# The kernel's files, under cgroups of version 2 and 1: where, limit, usage, and in memory.stat the cache that can go
_CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def container_memory(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that each memory limit of the control groups that this process is in leaves."""
    try:
        groups = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for controllers, path in groups:
        if controllers not in _CGROUPS:
            continue
        base, limit, usage, cache = _CGROUPS[controllers]
        inner = root / base / path.lstrip("/")
        for folder in (inner, *(up for up in inner.parents if up.is_relative_to(root / base))):
            with contextlib.suppress(OSError, ValueError):  # not there, not to be read, or "max"
                most = int((folder / limit).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, most - int((folder / usage).read_text()) + int(stat.get(cache, 0)))
