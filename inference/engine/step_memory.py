"""An upper bound of what one forward's tensors take beside weights and latents. Bytes; nothing is allocated.

It adds up what may exist together in the widest half of a layer, or around the logits: the activations of all tokens,
what the most wasteful op makes beside them, the experts' rows, and what attention works in. Worst case: every sequence
is at the end of its context, its pages are scattered, and all tokens choose the same expert. It grows with tokens,
sequences and context. Tests hold it to the tensors that really exist, which never take more. Left out: what torch's
libraries take inside an op.
"""

import torch

from core.batch import DECODE_ROWS
from core.config import BLOCK_SIZE
from core.run_config import PAGE_SIZE, RunConfig
from engine.rank_memory import RankSpec, in_blocks
from ops import reference
from ops.cpu import kernels as kernel_cpu
from ops.reference_backend import ROW_BLOCK

SCORED_ROWS = 256  # rows of prompt logits that exist at one time
DRAWN_ROWS, SAMPLER_BYTES = 32, 56  # distributions the sampler makes at one time, and what it takes a token of one
# What the ops limit themselves to; a test holds each to the op that has it.
SPLIT_BYTES, SLAB_BYTES, PROGRAMS, DECODE_TILE_ROWS = 256 << 20, 1 << 30, 264, 64  # ops/gpu/attention.py
SPLIT_K_BYTES = 10 << 20  # a product's sums of parts of K, 64 at most a result (ops/gpu/gemm.py)
EXPANDED_BYTES, TORCH_DECODE_ROWS = 1 << 30, 16  # attention in torch's ops on a CPU
KEYS, PARTS, PART_ROWS = 256, 64, 8192  # compiled decoding: keys of a part, parts of a row, and rows of a sequence's


def step_bytes(rank: RankSpec, config: RunConfig, decode: bool = False) -> int:
    """The most that the tensors of the largest forward take that `config` allows; with `decode` of the largest that
    brings one token and its drafts of each sequence."""
    args, b = rank.args, rank.num.dtype.itemsize
    sampled = config.max_num_seqs * (1 + config.mtp)
    tokens, rows = (sampled, 1 + config.mtp) if decode else (config.max_step_tokens, config.max_step_tokens)
    layer = _attention(rank, config, tokens, rows)
    if args.n_dense_layers:
        layer = max(layer, _mlp(rank, tokens, -(-args.inter_dim // rank.ranks)))
    if args.n_moe_layers or rank.mtp:
        layer = max(layer, _moe(rank, tokens))
    row = 4 * args.vocab_size  # of logits: float32; with several ranks a rank's, all ranks', and these in one piece
    scored = min(tokens, max(sampled, 0 if decode else SCORED_ROWS))
    head = scored * (row * (1 if rank.ranks == 1 else 3) + 8 * args.dim)
    sampler = sampled * row + min(sampled, DRAWN_ROWS) * SAMPLER_BYTES * args.vocab_size
    drafts = 2 * config.max_num_seqs * config.mtp * row  # the distributions they were drawn from, float64
    return drafts + max(layer, b * tokens * args.dim + max(head, sampler))


def _layer(rank: RankSpec, tokens: int, values: int, widest: int) -> int:
    """Half a layer: the residual stream with its norm and result (at most seven times H), `values` more of each token,
    and what one op makes beside its result, `widest` being the most values of a token it reads or makes."""
    args, b = rank.args, rank.num.dtype.itemsize
    widest = max(widest, args.dim)
    if rank.gpu:
        beside = min(64 * tokens * widest, SPLIT_K_BYTES) if rank.num.gemm else 0
    elif rank.num.gemm:  # W8A8 as the reference has it: sums, a block's product, its scales, and that scaled
        beside = 16 * tokens * widest
    elif rank.compiled:  # a product's input in float32, a chunk at a time, and a row of a norm for each thread
        beside = min(4 * tokens * widest, kernel_cpu.CHUNK_BYTES + 48 * widest)
        beside += 4 * torch.get_num_threads() * args.dim
    else:  # float32 copies: three in a norm, one of gate and up, or as the reference has it four of halves of them
        beside = 4 * tokens * max(3 * args.dim, (2 if rank.reference else 1) * widest)
    if rank.num.batch_invariant:  # a product's blocks of rows, before they are one
        beside += 2 * b * tokens * widest
        if rank.ranks > 2:  # all ranks' parts of a sum, which are added in order
            beside = max(beside, b * tokens * (rank.ranks + 1) * args.dim)
    return b * tokens * (7 * args.dim + values) + 4 * tokens * args.qk_rope_head_dim + beside


def _mlp(rank: RankSpec, tokens: int, inner: int) -> int:
    return _layer(rank, tokens, 3 * in_blocks(inner), 2 * in_blocks(inner))


def _moe(rank: RankSpec, tokens: int) -> int:
    """A GPU has the rows of all assignments at once; a CPU one expert's, or a bundle of small ones in float32."""
    args, b = rank.args, rank.num.dtype.itemsize
    inner, top = in_blocks(rank.inner), args.n_activated_experts
    shared = in_blocks(-(-args.n_shared_experts * args.moe_inter_dim // rank.ranks))
    if rank.gpu:
        rows, of_value, sums = tokens * top, b, b
    elif rank.packs:
        rows, of_value, sums = kernel_cpu.bundle_rows(tokens, top), 4, 4
    else:
        rows, of_value, sums = tokens, b, 12
        if rank.packs_experts:  # of some layers
            rows, of_value = max(rows, kernel_cpu.bundle_rows(tokens, top)), 4
    widened = 4 * tokens * args.dim if any(name.endswith(".gate") for name, _ in rank.num.exceptions) else 0
    routing = widened + 48 * tokens * top + 4 * args.n_routed_experts * min(32 * tokens, 8 * tokens + 2048)
    experts = rows * of_value * (args.dim + 3 * inner) + tokens * sums * args.dim
    return _layer(rank, tokens, 3 * shared, 2 * max(shared, inner)) + routing + experts


def _attention(rank: RankSpec, config: RunConfig, tokens: int, rows: int) -> int:
    """Projections, and what the op works in. One sequence has up to `rows` of the tokens."""
    args, n = rank.args, -(-rank.args.n_heads // rank.ranks)
    width, q, latent = args.qk_head_dim, args.q_lora_rank, args.latent_dim
    values = 2 * q + BLOCK_SIZE + latent + n * (width + args.qk_rope_head_dim + 2 * args.v_head_dim)
    widest = latent + max(n * width, n * args.v_head_dim, 3 * q)
    works_in = _on_gpu if rank.gpu and rank.num.dtype == torch.bfloat16 else _in_torch
    return _layer(rank, tokens, values, widest) + works_in(rank, config, tokens, rows, n)


def _on_gpu(rank: RankSpec, config: RunConfig, tokens: int, rows: int, n: int) -> int:
    """ops/gpu/attention.py: absorbed queries and results with the parts of split keys; many rows attend to keys and
    values that are expanded a slab at a time, with their sums carried from slab to slab."""
    args, b, sequences = rank.args, rank.num.dtype.itemsize, config.max_num_seqs
    c, both = args.kv_lora_rank, args.qk_nope_head_dim + args.v_head_dim
    alike = rank.num.batch_invariant  # all rows are absorbed, in blocks
    absorbed = n * (tokens if alike else min(tokens, DECODE_ROWS * sequences))
    tile = min(DECODE_TILE_ROWS, min(rows, DECODE_ROWS) * n)
    filled = absorbed + sequences * tile
    parts = min(4 * (c + 1) * min(filled * config.pages_per_sequence, filled + PROGRAMS * tile), SPLIT_BYTES)
    decoded = absorbed * (2 * b * c * (2 if alike else 1) + 12) + parts * (c + 1) // c
    if rows <= DECODE_ROWS:
        return decoded
    keys = min(sequences, -(-tokens // DECODE_ROWS)) * config.pages_per_sequence * PAGE_SIZE
    slab = min(SLAB_BYTES, b * keys * (n * both + args.latent_dim))
    return decoded + slab + 4 * tokens * n * (args.v_head_dim + 1)


def _in_torch(rank: RankSpec, config: RunConfig, tokens: int, rows: int, n: int) -> int:
    """ops/reference.py and the CPU's forms: gathered latents, and the form that takes the most for so many rows."""
    args, b, sequences = rank.args, rank.num.dtype.itemsize, min(config.max_num_seqs, tokens)
    c, r, dv, latent, width = (
        args.kv_lora_rank, args.qk_rope_head_dim, args.v_head_dim, args.latent_dim, args.qk_head_dim
    )  # fmt: skip
    context = config.pages_per_sequence * PAGE_SIZE
    w_uk, w_uv = (torch.empty(1, d, c, device="meta") for d in (width - r, dv))
    few = reference.absorbed_rows(w_uk, w_uv, r)
    plain = rank.gpu or rank.reference  # attention is the reference's
    alike = rank.num.batch_invariant  # one sequence after another, absorbed, a block of rows at a time
    written = rank.compiled and not rank.num.fp8_latents  # rotated and written by C
    compiled = written and not alike
    together = min(sequences, 2) if plain or alike or (compiled and rows > few) else 0 if compiled else sequences
    taken = context * latent * (b * together + (14 if rank.num.fp8_latents else 0))
    if not (rank.gpu or written):  # rotation in float32
        taken += 16 * tokens * (n * r + latent)
    if alike:
        filled = (context + reference.KEY_TILE) * latent * b  # to whole tiles of keys
        return taken + filled + _tiles(b, min(rows, ROW_BLOCK), n, latent, c, 1, context)
    forms = []
    if compiled:
        filled = n * min(tokens, few * sequences) + 16 * sequences
        parts = min(filled * min(-(-context // KEYS), PARTS), filled + PART_ROWS * sequences)
        forms.append(4 * (2 * filled * latent + parts * (c + 66) + torch.get_num_threads() * 80 * (latent + 64)))
    else:
        forms.append(_tiles(b, min(rows, few), n, latent, c, 1, context))
    if not plain and not compiled:
        some = min(rows, TORCH_DECODE_ROWS)
        mask = some * context * n * (1 + b) if some > 1 else 0
        forms.append(b * min(tokens, some * sequences) * n * (4 * c + 2 * r + max(r, dv)) + mask)
    if rows > few:
        keys = 4 * context * n * width
        if not plain and dv <= width and 2 * keys <= EXPANDED_BYTES:  # at once
            forms.append(3 * keys + 4 * (context * latent + n * dv * c) + rows * (5 * context + 12 * n * width))
        else:
            forms.append(_tiles(b, rows, n, width, dv, n, context))
    return taken + max(forms)


def _tiles(b: int, rows: int, n: int, d: int, dv: int, key_heads: int, context: int) -> int:
    """reference.mla_absorbed and mla_expanded: queries and results of all rows, and of those whose scores exist at one
    time float32 queries, sums and scores, with a tile of keys and values."""
    at_once, tile = min(rows * n, max(n, reference.SCORE_TILE // reference.KEY_TILE)), min(context, reference.KEY_TILE)
    return rows * n * (b * d + 4 * dv) + at_once * (8 * d + 16 * dv + 16 * tile) + 10 * key_heads * tile * (d + dv)
