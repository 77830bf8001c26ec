"""An upper bound of what one forward's tensors take beside weights and latents. Bytes; nothing is allocated.

It is the greatest of five peaks: attention, a dense MLP, the experts, logits, sampling. Each adds up what may exist
together there in the worst case: every sequence is at the end of its context, its pages are scattered, all tokens
choose the same expert, and an op takes the form that needs the most. Where backends differ little they share a term,
that of the most wasteful one. It grows with tokens, sequences and context. Tests hold it to the tensors that really
exist, which never take more. Left out: what torch's libraries take inside an op.
"""

import torch

from core.batch import DECODE_ROWS
from core.config import ModelArgs
from core.run_config import PAGE_SIZE, RunConfig
from engine.rank_memory import RankSpec, in_blocks
from ops import reference
from ops.cpu import attention as cpu_attention
from ops.cpu import kernels
from ops.reference_backend import ROW_BLOCK

SCORED_ROWS, HEAD_ROWS = 256, 4096  # rows of prompt logits at one time; of the head, that the reference widens
DRAWN_ROWS, SAMPLER_BYTES = 32, 56  # distributions the sampler makes at one time, and what it takes a token of one
# Limits that ops have, of which a test compares each with the op's own; importing them would take Triton, or C.
SPLIT_BYTES, SLAB_BYTES, TILE_ROWS, FIXED_SPLIT = 256 << 20, 1 << 30, 64, 512  # ops/gpu: attention
PROGRAMS, PROGRAM_ROWS = 304, 9728  # of decode on any GPU, and all their rows together
SPLIT_K_BYTES = 10 << 20  # ops/gpu/gemm.py: a product's sums of parts of K
LANES, COLUMNS, SPLIT, PART_ROWS, THREAD_ROWS = 16, 64, 256, 8192, 80  # ops/cpu/kernels.c, for mla: see _in_c
BLOCK_KEYS, PANEL, ROWS = 256, 32, 12  # the same, for mla_prefill: see _expanded_in_c


def step_bytes(rank: RankSpec, config: RunConfig, decode: bool = False) -> int:
    """The most that the tensors of the largest forward take that `config` allows; with `decode` of the largest that
    brings one token and its drafts of each sequence. With lanes, MLPs and experts run on the tokens of all;
    what exchanging these takes is less than running on them, and over by then."""
    args, num, sampled = rank.args, rank.num, config.max_num_seqs * (1 + config.mtp)
    tokens, rows = (sampled, 1 + config.mtp) if decode else (config.max_step_tokens, config.max_step_tokens)
    gathered = rank.lanes * tokens
    scored = min(tokens, max(sampled, 0 if decode else SCORED_ROWS))
    row = 4 * args.vocab_size  # of logits, float32
    head = 4 * min(args.vocab_size, HEAD_ROWS) * args.dim if rank.reference else 0
    peaks = {
        "attention": _attention(rank, config, tokens, rows),
        "dense MLP": _layer(rank, gathered, -(-args.inter_dim // rank.mlp_ranks)) if args.n_dense_layers else 0,
        "experts": _experts(rank, gathered) if args.n_moe_layers or rank.mtp else 0,
        "logits": scored * (row * (3 if rank.tp > 1 else 2) + 8 * args.dim) + head,  # parts of a row, and it joined
        "sampling": sampled * row + _sampler(rank, sampled),
    }
    # the distributions they were drawn from: in float64, or in float32 and, of several, joined
    once = rank.gpu and config.mtp < 2
    drafts = (1 if once else 2) * config.max_num_seqs * config.mtp * row
    return drafts + num.dtype.itemsize * tokens * args.dim + max(peaks.values())


def _sampler(rank: RankSpec, sampled: int) -> int:
    """A GPU samples from logits where they are, unless they were in several places, or changed by penalties and masks;
    others make distributions of some rows at a time."""
    if rank.gpu:
        return 2 * sampled * 4 * rank.args.vocab_size
    return min(sampled, DRAWN_ROWS) * SAMPLER_BYTES * rank.args.vocab_size


def _layer(rank: RankSpec, tokens: int, inner: int, values: int = 0, widest: int = 0) -> int:
    """The residual stream with its norm and result (at most six times H), gate, up and product of an MLP of width
    `inner`, `values` more of each token, the rotary angles, and what one op makes beside its result: float32 copies of
    the `widest` values of a token that it reads or makes, with sums and a block of the weight where that is FP8."""
    args, num, b = rank.args, rank.num, rank.num.dtype.itemsize
    inner, widest = in_blocks(inner), max(widest, 2 * in_blocks(inner), args.dim)
    of_value = 0 if rank.gpu else 4 if rank.packs else 16 if num.gemm else 8
    beside = of_value * (tokens + 32 + torch.get_num_threads()) * max(widest, 2 * args.dim)
    beside += SPLIT_K_BYTES if rank.gpu and num.gemm else 0
    if num.batch_invariant:  # a product's blocks of rows before they are one, or all ranks' parts of a sum
        beside += b * (tokens + ROW_BLOCK) * max(2 * widest, (rank.tp + 1) * args.dim)
    if num.virtual_ranks > 1:  # float32 sums of their tree, and of all ranks' parts
        beside += 4 * tokens * args.dim * (num.virtual_ranks.bit_length() + rank.tp)
    return b * tokens * (6 * args.dim + 3 * inner + values) + 4 * tokens * args.qk_rope_head_dim + beside


def _experts(rank: RankSpec, tokens: int) -> int:
    """The router's tables, and rows: a GPU has those of all assignments at once; a CPU one expert's, or a bundle of
    small ones, in float32."""
    args, b, top = rank.args, rank.num.dtype.itemsize, rank.args.n_activated_experts
    rows, of_value, sums = (tokens * top, b, b) if rank.gpu else (kernels.bundle_rows(tokens, top), 4, 12)
    routing = 48 * tokens * top + 4 * args.n_routed_experts * (8 * tokens + 1024 + args.dim)
    experts = rows * of_value * (args.dim + 3 * in_blocks(rank.inner)) + tokens * sums * args.dim
    shared = -(-args.n_shared_experts * args.moe_inter_dim // rank.mlp_ranks)
    return _layer(rank, tokens, shared, 0, 2 * in_blocks(rank.inner)) + routing + experts


def _attention(rank: RankSpec, config: RunConfig, tokens: int, rows: int) -> int:
    """Projections, and what the op works in. One sequence has up to `rows` of the tokens."""
    args, q, latent, n = rank.args, rank.args.q_lora_rank, rank.args.latent_dim, -(-rank.args.n_heads // rank.tp)
    of_heads = n * (args.qk_head_dim + args.qk_rope_head_dim + 2 * args.v_head_dim)
    widest = latent + max(n * args.qk_head_dim, n * args.v_head_dim, 3 * q)
    in_c = rank.compiled and not (rank.num.batch_invariant or rank.num.fp8_latents)
    works_in = _on_gpu if rank.gpu and rank.num.dtype == torch.bfloat16 else _in_c if in_c else _in_torch
    sequences, context = min(config.max_num_seqs, tokens), config.pages_per_sequence * PAGE_SIZE
    layer = _layer(rank, tokens, 0, q + in_blocks(q) + latent + of_heads, widest)
    return layer + works_in(rank, tokens, rows, sequences, context, n)


def _on_gpu(rank: RankSpec, tokens: int, rows: int, sequences: int, context: int, n: int) -> int:
    """ops/gpu/decode.py and prefill.py: few rows of a sequence are absorbed, and its parts of keys joined;
    many attend to keys and values that are expanded a slab at a time, with their sums carried from slab to slab."""
    args, b, alike = rank.args, rank.num.dtype.itemsize, rank.num.batch_invariant
    few = rows if alike else min(rows, DECODE_ROWS)
    tile = min(TILE_ROWS, few * n)
    rounded = tile if n <= TILE_ROWS or n % TILE_ROWS == 0 else n + tile  # a sequence's rows, up to whole tiles
    absorbed = n * min(tokens, few * sequences) + rounded * sequences
    parts = absorbed * -(-context // (FIXED_SPLIT if alike else PAGE_SIZE))
    if not alike:
        parts = absorbed + min(parts, PROGRAMS * tile, PROGRAM_ROWS)  # each program's first, and every further tile's
    decode = 4 * b * absorbed * args.latent_dim + min(4 * args.kv_lora_rank * parts, SPLIT_BYTES) + 4 * parts
    keys = min(sequences, -(-tokens // DECODE_ROWS)) * context if rows > few else 0
    slab = min(SLAB_BYTES, b * keys * (n * (args.qk_nope_head_dim + args.v_head_dim) + args.latent_dim))
    return decode + slab + 4 * tokens * n * (args.v_head_dim + 1)


def _in_torch(rank: RankSpec, tokens: int, rows: int, sequences: int, context: int, n: int) -> int:
    """ops/reference.py and ops/cpu/attention.py: gathered latents, and the form that takes the most."""
    args, num, b, alike = rank.args, rank.num, rank.num.dtype.itemsize, rank.num.batch_invariant
    c, r, dv = args.kv_lora_rank, args.qk_rope_head_dim, args.v_head_dim
    latent, width, few = args.latent_dim, args.qk_head_dim, _absorbed_rows(args)
    plain = rank.gpu or rank.reference
    gathered = b * (min(sequences, 2) + alike if plain or alike else sequences) + 14 * num.fp8_latents
    forms = [_tiles(b, ROW_BLOCK if alike else min(rows, few), n, latent, c, 8 * latent)]
    if not alike:
        mask = cpu_attention.TORCH_DECODE_ROWS * context * n * (1 + b)
        forms += [b * n * min(tokens, few * sequences) * (4 * latent + dv) + mask]
    if not alike and rows > few:
        at_once = 0 if plain or dv > width else min(context, cpu_attention.EXPANDED_BYTES // (8 * n * width))
        forms += [at_once * (12 * n * width + 4 * latent) + 4 * n * dv * c + rows * (5 * at_once + 12 * n * width)]
        forms += [_tiles(b, rows, n, width, dv, 10 * n * (width + dv))] if at_once < context else []
    rotated = 16 * tokens * (n * r + latent)  # in float32, before anything is gathered
    return max(rotated, (context + alike * reference.KEY_TILE) * latent * gathered + max(forms))


def _absorbed_rows(args: ModelArgs) -> int:
    dims = args.qk_nope_head_dim, args.v_head_dim
    w_uk, w_uv = (torch.empty(1, d, args.kv_lora_rank, device="meta") for d in dims)
    return reference.absorbed_rows(w_uk, w_uv, args.qk_rope_head_dim)


def _in_c(rank: RankSpec, tokens: int, rows: int, sequences: int, context: int, n: int) -> int:
    """ops/cpu/kernels.c, which reads latents in their pages: what mla takes for few rows of a sequence, or mla_prefill
    for many. mla joins the results of parts of SPLIT keys or more, PART_ROWS of a sequence or one of each row; a thread
    has THREAD_ROWS."""
    args, b, few = rank.args, rank.num.dtype.itemsize, max(_absorbed_rows(rank.args), kernels.ABSORBED_ROWS)
    dn, r, c, dv = args.qk_nope_head_dim, args.qk_rope_head_dim, args.kv_lora_rank, args.v_head_dim
    absorbed = n * min(tokens, few * sequences) + LANES * sequences + THREAD_ROWS * torch.get_num_threads()
    parts = min(absorbed * -(-context // SPLIT), max(absorbed, PART_ROWS) + PART_ROWS * (sequences - 1))
    wide = -(-c // COLUMNS) * COLUMNS
    by_mla = b * absorbed * (4 * args.latent_dim + dv) + 4 * parts * (wide + 2)
    return max(by_mla, _expanded_in_c(rows, context, n, dn, r, c, dv) if rows > kernels.ABSORBED_ROWS else 0)


def _expanded_in_c(rows: int, context: int, n: int, dn: int, r: int, c: int, dv: int) -> int:
    """The latents in panels, and what each thread has: a head's weights, BLOCK_KEYS of its keys and values, and queries
    and sums of the rows that it takes, all in float32 at most."""
    threads, width, values = torch.get_num_threads(), dn + r + 2, -(-dv // PANEL) * PANEL
    rows = -(-rows // -(-threads // n)) + 2 * ROWS
    thread = 4 * (dn + dv) * (c + 1) + 2 * BLOCK_KEYS * (width + values) + 4 * max(dn, dv) * PANEL
    thread += 4 * rows * (width + values + 2) + 8 * ROWS * BLOCK_KEYS + 4 * 64
    return 2 * (context + PANEL) * (c + r + 2) + threads * thread


def _tiles(b: int, rows: int, n: int, d: int, dv: int, key: int) -> int:
    """reference.mla_absorbed and mla_expanded: queries and results of all rows, and of those whose scores exist at one
    time float32 queries, sums and scores, with a tile of keys and values, `key` bytes each."""
    at_once, tile = min(rows * n, max(n, reference.SCORE_TILE // reference.KEY_TILE)), reference.KEY_TILE
    return rows * n * (b * d + 4 * dv) + at_once * (8 * d + 16 * dv + 16 * tile) + key * tile
