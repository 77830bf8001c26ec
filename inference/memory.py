"""What a rank of a run takes: its memory by part, and the bytes a decode step reads. Arithmetic; nothing is allocated.

Weights are counted from the table in weights.py, in the form in which they stay in memory; latents and the tensors of
a step follow model.py, ops.py and the engine as they are. The engine asks here before it loads, and for its page pool.

Sizes are bytes unless said. Letters in comments are model.py's.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

import cpu
import reference
import weights
from config import BLOCK_SIZE, ModelArgs
from errors import UserError
from model import PAGE_SIZE, Numerics
from parallel import Group
from weights import Spec

Experts = Literal["whole", "split"]
GPU_SHARE = 0.9  # of what weights and a step leave: the rest is for the allocator's gaps and the libraries' own buffers
HOST_SHARE = 0.5  # the same of a host, which others need too
SCORED_ROWS = 256  # rows of prompt logits that exist at one time

EMBEDDING, HEAD, ATTENTION, DENSE = "embedding", "head", "attention", "dense MLPs"
ROUTED, SHARED, SMALL, MTP = "routed experts", "shared experts", "router, norms", "MTP module"
PARTS = (EMBEDDING, HEAD, ATTENTION, DENSE, ROUTED, SHARED, SMALL)


@dataclass(frozen=True)
class Rank:
    """One rank of a run, as far as its memory depends on it."""

    args: ModelArgs
    num: Numerics
    ranks: int = 1
    gpu: bool = True  # a GPU's forms of the ops and weights, else a CPU's
    mtp: bool = False  # the MTP module is loaded, whether or not it drafts
    experts: Experts = "whole"

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
    for name, spec in weights.expected_tensors(args, quantised, mtp).items():
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


def choose_experts(args: ModelArgs, ranks: int, fp8: bool, asked: Literal["auto", "whole", "split"]) -> Experts:
    """How routed experts lie on the ranks: "auto" is split on the inner width, which every rank then works on at any
    batch size, where that divides (in FP8 into whole blocks), else whole. Raises UserError for a split that does not.
    """
    width = args.moe_inter_dim
    divides = width % ranks == 0 and not (fp8 and ranks > 1 and width // ranks % BLOCK_SIZE)
    if asked == "split" and not divides:
        blocks = f" in whole {BLOCK_SIZE}-wide FP8 blocks" if fp8 else ""
        raise UserError(f"--experts split: {ranks} ranks cannot share the experts' width of {width}{blocks}")
    return "split" if asked == "split" or (asked == "auto" and divides and ranks > 1) else "whole"


def weight_bytes(rank: Rank) -> dict[tuple[bool, str], int]:
    """Every rank's weights as they lie in memory after `prepare`, by (of the MTP module, part); scales are counted
    with what they scale.

    Unlike on disk, wkv_b is never FP8; on a CPU the head is float32; a tied head, and the MTP module's copies of
    embedding and head, do not exist. oneDNN's packed form has the plain one's bytes.
    """
    found: Counter[tuple[bool, str]] = Counter()
    group = Group(0, rank.ranks)  # the ranks' parts are equal
    for kind, n in _kinds(rank.args, rank.num.gemm is not None, rank.mtp).items():
        cut = _cut(kind, group, rank)
        if cut is not None:
            found[kind.mtp, kind.part] += n * math.prod(b - a for a, b in cut) * _held_itemsize(kind, rank)
    return dict(found)


def _cut(kind: _Kind, group: Group, rank: Rank) -> tuple[tuple[int, int], ...] | None:
    return kind.spec.cut(group, rank.args, rank.experts)


def _held_itemsize(kind: _Kind, rank: Rank) -> int:
    """Bytes a value of the tensor takes in memory; 0 if it is not kept."""
    plain = rank.num.dtype.itemsize
    if kind.leaf == "wkv_b.weight":
        return plain
    if kind.leaf == "wkv_b.scale" or (kind.mtp and kind.part in (EMBEDDING, HEAD)):
        return 0
    if kind.part == HEAD:
        held = plain if rank.gpu else 4
        return 0 if rank.args.tie_word_embeddings and held == plain else held
    if kind.spec.dtype == torch.float8_e4m3fn or kind.leaf.endswith((".scale", ".bias")):
        return kind.spec.dtype.itemsize
    return plain


def parameters(rank: Rank, mtp: bool = False) -> int:
    """How many weights the main model has, all ranks' together, or the MTP module alone, whose embedding and head are
    the main model's."""
    kinds = _kinds(rank.args, rank.num.gemm is not None, rank.mtp)
    return sum(n * math.prod(kind.spec.shape) for kind, n in kinds.items()
               if kind.mtp == mtp and kind.spec.required and not kind.leaf.endswith(".scale"))  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Latents
# --------------------------------------------------------------------------------------------------------------------


def latent_bytes(rank: Rank, mtp: bool | None = None) -> int:
    """Of one token, all layers together; every rank keeps the same. `mtp` True or False: the MTP module's or the main
    model's alone."""
    args, num = rank.args, rank.num
    width = args.latent_dim * num.dtype.itemsize
    if num.fp8_latents:
        width = reference.packed_latent_bytes(args.kv_lora_rank, args.qk_rope_head_dim)
    layers = (args.n_layers if mtp is not True else 0) + (args.n_mtp_layers if rank.mtp and mtp is not False else 0)
    return layers * width


def page_bytes(rank: Rank) -> int:
    return PAGE_SIZE * latent_bytes(rank)


# --------------------------------------------------------------------------------------------------------------------
# A step
# --------------------------------------------------------------------------------------------------------------------


def step_bytes(rank: Rank, limits: Limits, decode: bool = False) -> int:
    """The most that one forward's tensors take at a time, beside weights and latents: the largest the limits allow, or
    with `decode` one of max_num_seqs sequences that bring a token and its drafts.

    Counted are the tensors that exist together in the worst place of a layer, or around the logits. Taken as the worst
    case: all tokens belong to one sequence at the end of its context, its pages are scattered, and all of them choose
    the same expert. Left out: the sampler's rows, and what torch's libraries take inside an op.
    """
    args, num = rank.args, rank.num
    tokens = limits.max_num_seqs * (1 + limits.mtp) if decode else limits.budget
    rows = 1 + limits.mtp if decode else tokens  # of one sequence
    hidden = tokens * args.dim * num.dtype.itemsize  # (T, H)
    width = -(-args.inter_dim // rank.ranks)
    attention = _attention(rank, tokens, rows, limits.max_model_len, limits.max_num_seqs > 1)
    mlp = _mlp(rank, tokens, width) if args.n_dense_layers else 0
    moe = _moe(rank, tokens) if args.n_moe_layers or rank.mtp else 0
    # what came into the layer and its normed form, behind attention also the sum of the two so far; cos and sin; in a
    # draft the main model's states and those of them it starts from
    layer = 4 * tokens * args.qk_rope_head_dim + max(2 * hidden + attention, 3 * hidden + max(mlp, moe))
    layer += 2 * hidden if limits.mtp else 0
    sampled = limits.max_num_seqs * (1 + limits.mtp)
    sampled = min(max(sampled, 0 if decode else SCORED_ROWS), tokens)
    logits = 4 * sampled * args.vocab_size  # float32
    gathered = logits // rank.ranks + 2 * logits if rank.ranks > 1 else logits  # a rank's, all ranks', and in one piece
    return max(layer, hidden + sampled * args.dim * (4 + num.dtype.itemsize) + gathered)


def _float_copy(rank: Rank) -> int:
    """What x.float() takes a value: nothing where x is float32 already."""
    return 0 if rank.num.dtype == torch.float32 else 4


def _linear(rank: Rank, rows: int, k: int, n: int) -> int:
    """What a product (rows, k) by (n, k) takes: its result, and in W8A8 the quantised input with its scales."""
    out = rows * n * rank.num.dtype.itemsize
    if rank.num.gemm != "fp8":
        return out
    quantised = rows * k + 4 * rows * -(-k // BLOCK_SIZE)
    # the reference, on a CPU, quantises from a padded copy and adds up in float32
    return quantised + (out if rank.gpu else max(8 * rows * k, 12 * rows * n))


def _norm(rank: Rank, rows: int, width: int) -> int:
    """RMSNorm: a float32 copy, and two float32 tensors on the way to the result."""
    return rows * width * (_float_copy(rank) + 8)


def _mlp(rank: Rank, rows: int, inner: int) -> int:
    """SwiGLU: gate and up, their product in float32; then the product and the second projection."""
    b, dim = rank.num.dtype.itemsize, rank.args.dim
    copy = _float_copy(rank)
    product = rows * inner * (copy + 4 + (max(copy, 4) if rank.gpu else 0))
    first = _linear(rank, rows, dim, inner) + rows * inner * b
    return max(first, 2 * rows * inner * b + product, rows * inner * b + _linear(rank, rows, inner, dim))


def _moe(rank: Rank, tokens: int) -> int:
    """Router, then this rank's experts one after another into a float32 sum, then the shared ones."""
    args, b = rank.args, rank.num.dtype.itemsize
    fraction = rank.ranks if rank.experts == "split" else 1
    inner = -(-args.moe_inter_dim // fraction)
    router = 16 * tokens * args.n_routed_experts + (0 if rank.gpu else 4 * args.dim * (tokens + args.n_routed_experts))
    total = 4 * tokens * args.dim  # (T, H) float32
    chosen = 48 * tokens * args.n_activated_experts  # ids, weights and their order, int64 and float32
    expert = max(tokens * args.dim * b + _mlp(rank, tokens, inner), tokens * args.dim * 8)
    shared = _mlp(rank, tokens, -(-args.n_shared_experts * args.moe_inter_dim // rank.ranks))
    return max(router, total + chosen + max(expert, shared, tokens * args.dim * b))


def _attention(rank: Rank, tokens: int, rows: int, context: int, several: bool) -> int:
    """The projections of all tokens, and one sequence's attention: its latents gathered (while those of the one before
    are still there), and the form that takes more of the two that its rows may have."""
    args, b = rank.args, rank.num.dtype.itemsize
    n, dn, r, dv = -(-args.n_heads // rank.ranks), args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim
    c, width = args.kv_lora_rank, dn + r
    queries = tokens * n * width * b
    into = _linear(rank, tokens, args.q_lora_rank or args.dim, n * width) + tokens * args.q_lora_rank * b
    inside = queries + tokens * b * (2 * (c + r) + n * r + n * dv)  # what lives while the sequences attend
    gathered = context * (c + r) * b
    before = gathered if several else 0
    unpacking = 0
    if rank.num.fp8_latents:
        unpacking = context * (12 * c + 2 * reference.packed_latent_bytes(c, r))
    saved = 2 * c + r - width - dv  # see reference.absorbed_rows
    few = c * (dn + dv) // saved if saved > 0 else 1 << 30
    form = _absorbed(rank, min(rows, few), n, context)
    if rows > few:
        form = max(form, _expanded(rank, rows, n, context))
    out = queries + tokens * b * (2 * (c + r) + n * dv) + _linear(rank, tokens, n * dv, args.dim)
    return max(into, inside + before + max(unpacking, gathered + form), out + before)


def _absorbed(rank: Rank, rows: int, n: int, context: int) -> int:
    """reference.mla_absorbed: queries in the latent space, one tile of keys for all heads."""
    args, b = rank.args, rank.num.dtype.itemsize
    c, r = args.kv_lora_rank, args.qk_rope_head_dim
    queries = rows * n * (c + r) * b
    return queries + 4 * rows * n * c + _attend(rows, n, c + r, c, 1, context, _float_copy(rank) > 0)


def _expanded(rank: Rank, rows: int, n: int, context: int) -> int:
    """reference.mla_expanded, a tile of keys and values at a time, or cpu.mla_expanded, all at once."""
    args, b = rank.args, rank.num.dtype.itemsize
    dn, r, dv = args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim
    width = dn + r
    queries = rows * n * width * b
    keys = context * n * width * b
    if not rank.gpu and dv <= width and 2 * keys <= cpu.EXPANDED_BYTES:
        mask = rows * context * (1 + b) if rows < context else 0
        making = context * n * dv * b  # the values, before they are padded to the keys' width
        return 2 * keys + max(making, queries + mask + queries)
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


class Need(NamedTuple):
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


def need(rank: Rank, limits: Limits, cache: int | None = None) -> Need:
    """With a cache of so many bytes, which somebody chose, or one for a sequence of full length, beside which the
    rank's share of memory stays free.

    Graphs keep the tensors of a decode step to themselves; a CPU has none, but packs its weights, a stack of experts
    at a time.
    """
    parts = weight_bytes(rank)
    graphs = step_bytes(rank, limits, decode=True) if rank.gpu else 0
    layers = rank.args.n_moe_layers
    packing = 0 if rank.gpu or not layers else parts[False, ROUTED] // layers // 3  # w1, w2 and w3 have one size
    kept = 0
    if cache is None:
        cache = limits.pages * page_bytes(rank)
        kept = math.ceil(cache / rank.share) - cache
    return Need(sum(parts.values()), packing, step_bytes(rank, limits), graphs, cache, kept)


def pages_that_fit(rank: Rank, limits: Limits, free: int, shrink: bool = False) -> int:
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


def check_fits(rank: Rank, limits: Limits, free: int, cache: int | None = None, shrink: bool = False) -> None:
    """Raises UserError, naming what would help, when `free` bytes cannot hold the weights, a step and the smallest
    useful cache: one sequence of the length asked for; with `shrink`, which leaves the length open, one page; or
    `cache` bytes where somebody asks for them.
    """
    if shrink:
        limits = replace(limits, max_model_len=max(PAGE_SIZE - limits.mtp, 2))

    def fits(rank: Rank, limits: Limits = limits) -> bool:
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
    counts = (n for n in range(rank.ranks + 1, rank.args.n_heads + 1) if why_not(rank, n) is None)
    if more := next((n for n in counts if fits(with_ranks(rank, n))), None):
        ways.append(f"{more} ranks with as much memory each")
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


def with_ranks(rank: Rank, ranks: int, experts: Literal["auto", "whole", "split"] = "auto") -> Rank:
    """The same run on another number of ranks. Raises UserError as choose_experts does."""
    fp8 = rank.num.gemm is not None
    return replace(rank, ranks=ranks, experts=choose_experts(rank.args, ranks, fp8, experts))


def why_not(rank: Rank, ranks: int) -> str | None:
    """Why the model does not divide over so many ranks, in weights.check_ranks's words; None if it does."""
    try:
        weights.check_ranks(rank.args, ranks, rank.num.gemm is not None)
    except UserError as e:
        return str(e).partition(" (it works with")[0]
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


def decode_reads(rank: Rank, sequences: int, context: int, drafts: int = 0) -> Read:
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
