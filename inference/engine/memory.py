"""What a rank of a run takes in memory, and what fits: asked before anything is loaded, and for the size of the cache.

Weights and latents are exact (rank_memory.py); a step's tensors are an upper bound (step_memory.py). Sizes are bytes.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from checkpoint.partition import Partition, choose_experts
from checkpoint.table import has_experts
from core.errors import UserError
from core.run_config import PAGE_SIZE, AskedLayout, RunConfig
from engine import graphs, recorded_steps
from engine.rank_memory import ROUTED, weight_bytes
from engine.rank_memory import RankSpec as RankSpec
from engine.rank_memory import page_bytes as page_bytes
from engine.step_memory import SCORED_ROWS as SCORED_ROWS
from engine.step_memory import step_bytes
from ops.cpu import kernels as kernel_cpu

GPU_SHARE = 0.9  # of what weights and a step leave, for latents: the rest is for the allocator's gaps and for libraries
HOST_SHARE = 0.5  # the same of a host, which others need too, and of a device on which nothing was measured


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


def _share(rank: RankSpec) -> float:
    return GPU_SHARE if rank.gpu else HOST_SHARE


def need(rank: RankSpec, config: RunConfig, cache: int | None = None) -> MemoryBudget:
    """With a cache of so many bytes, which somebody chose, or one for a sequence of full length (in a pipeline one for
    each microbatch), beside which the rank's share of memory stays free. A CPU packs its weights, one projection or
    stack of experts at a time. Lanes have a page more, to which one without sequences writes."""
    parts = weight_bytes(rank)
    kept = 0
    if cache is None:
        cache = config.pp * config.pages_per_sequence * page_bytes(rank)
        kept = math.ceil(cache / _share(rank)) - cache
    step, graphs = _step(rank, config), _graphs(rank, config)
    return MemoryBudget(sum(parts.values()), _packing(rank, parts), step, graphs, cache, kept)


def _step(rank: RankSpec, config: RunConfig) -> int:
    return step_bytes(rank, config) + (page_bytes(rank) if rank.lanes > 1 else 0)


def _packing(rank: RankSpec, parts: dict[tuple[bool, str], int]) -> int:
    """What packing the largest weight takes beside all weights as they are before or, if that is more, after it."""
    args, plain = rank.args, rank.num.dtype.itemsize
    if rank.as_loaded:
        return 0
    head = (plain if rank.compiled else 4) * args.vocab_size // rank.tp * args.dim
    if "head" in dict(rank.num.exceptions):
        head = 0
    if not rank.packs and not (rank.compiled and rank.num.exceptions):
        return head
    queries = args.n_heads // rank.tp * max(args.qk_head_dim, args.v_head_dim)
    attention = plain * (queries + args.latent_dim) * max(args.dim, args.q_lora_rank)
    largest = max(head, attention, 2 * plain * args.inter_dim // rank.mlp_ranks * args.dim)
    shapes = (2 * rank.inner, args.dim), (args.dim, rank.inner)
    in_place = all(kernel_cpu.is_packed_in_place(*shape) for shape in shapes)
    if args.n_moe_layers and not in_place and (rank.packs or rank.packs_experts):
        largest = max(largest, parts.get((False, ROUTED), 0) // args.n_moe_layers * 2 // 3)  # w1 and w3 lie together
    return largest


def _graphs(rank: RankSpec, config: RunConfig) -> int:
    """What recorded decode steps keep to themselves. On a CPU all their tensors, and memory to work in. On a GPU a
    page; the tensors of the largest step; what all of them share, the input hidden states, the block table, and logits
    with the choice among them; and of each number of sequences its result and the inputs that are copied into it; once
    for the main model, and for each way to draft. And the same of a chunk of a prompt."""
    if recorded_steps.records(rank, config):
        return recorded_steps.kept_bytes(rank, config) + recorded_steps.scratch_bytes(rank, config)
    if config.eager or not graphs.records(rank.gpu, rank.num.dtype):
        return 0
    width = 1 + config.mtp
    recorded = [width, *({1, width} if config.mtp > 1 else {width} if config.mtp else ())]
    state = rank.args.dim * rank.num.dtype.itemsize
    most = config.max_num_seqs
    kept = most * (width * (state + 4 * rank.args.vocab_size + 16) + 4 * config.pages_per_sequence)
    for tokens in recorded:
        kept += sum(graphs.sizes(most)) * (tokens * state + 8 * (3 * tokens + 1)) + 4 * (most + 1)
    step = step_bytes(rank, config, decode=True)
    if graphs.records_chunks(config, rank.lanes):
        rows, keys = graphs.CHUNK_ROWS, graphs.CHUNK_KEYS
        kept += 2 * rows * state + 8 * (3 * rows + 1) + 4 * 2 + 4 * keys // PAGE_SIZE
        chunk = replace(config, max_num_seqs=1, max_num_batched_tokens=rows, max_model_len=keys, mtp=0)
        step = max(step, step_bytes(rank, chunk))
    return page_bytes(rank) + kept + step


def pages_that_fit(rank: RankSpec, config: RunConfig, free: int, shrink: bool = False) -> int:
    """Pages of latents for which `free` bytes beside the weights have room, after a step's tensors; 0 if none.

    A shorter context needs less for a step: with `shrink` it may be as much shorter as makes it fit.
    """

    def room(config: RunConfig) -> int:
        working = _step(rank, config) + _graphs(rank, config)
        return max(int((free - working) * _share(rank)) // page_bytes(rank), 0)

    pages = room(config)
    if pages >= config.pages_per_sequence or not shrink:
        return pages
    most = _most(config.pages_per_sequence, lambda p: room(replace(config, max_model_len=p * PAGE_SIZE)) >= p)
    return room(replace(config, max_model_len=most * PAGE_SIZE)) if most else 0


def sequences_that_fit(rank: RankSpec, config: RunConfig, free: int, most: int = 1 << 14) -> int:
    """How many sequences of full length `free` bytes beside the weights hold in a lane, or in all microbatches of a
    pipeline, at most `most`. Each adds to what a step takes, too."""

    def fits(n: int) -> bool:
        asked = replace(config, max_num_seqs=n)
        return pages_that_fit(rank, asked, free) // config.pp >= asked.seqs_per_microbatch * config.pages_per_sequence

    return _most(most, fits)


def _most(n: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to n that fits, where all smaller ones do; 0 if none does."""
    low = 0
    while low < n:
        middle = (low + n + 1) // 2
        low, n = (middle, n) if fits(middle) else (low, middle - 1)
    return low


def check_fits(rank: RankSpec, config: RunConfig, free: int, cache: int | None = None, shrink: bool = False) -> None:
    """Raises UserError, naming what would help, when `free` bytes cannot hold the weights, a step and the smallest
    useful cache: one sequence of the length asked for; with `shrink`, which leaves the length open, one page; or
    `cache` bytes where somebody asks for them.
    """
    if shrink:
        config = replace(config, max_model_len=max(PAGE_SIZE - config.mtp, 2))

    def fits(rank: RankSpec, config: RunConfig = config) -> bool:
        return need(rank, config, cache).total <= free

    if fits(rank):
        return
    wanted = need(rank, config, cache)
    lines = [f"weights {gb(wanted.weights)}"]
    if wanted.total == wanted.weights + wanted.packing:
        lines.append(f"packing them {gb(wanted.packing)}")
    else:
        what = "of one page" if shrink else f"of {config.max_model_len} tokens"
        lines.append(f"a step {gb(wanted.step + wanted.graphs)}")
        lines.append(f"latents {what if cache is None else 'as asked'} {gb(wanted.cache)}")
        lines += [f"kept free {gb(wanted.kept)}"] if wanted.kept else []
    ways = []
    counts = range(rank.ranks + rank.lanes, rank.lanes * rank.args.n_heads + 1, rank.lanes)
    others = (with_ranks(rank, n) for n in counts)
    if more := next((other for other in others if partition_error(other) is None and fits(other)), None):
        ways.append(f"{more.ranks} ranks with as much memory each")
    fewer = (replace(rank, lanes=n) for n in range(rank.lanes - 1, 0, -1) if rank.ranks % n == 0)
    if other := next((other for other in fewer if partition_error(other) is None and fits(other)), None):
        ways.append(f"--dp {other.lanes}")
    if cache is not None:
        tenths = (free - need(rank, config, 0).total) * 10 // 2**30
        ways += [f"--kv-cache-gib {tenths / 10}"] if tenths > 0 else []
    else:
        fp8 = replace(rank, num=replace(rank.num, fp8_latents=True))
        ways += ["--kv-cache-dtype fp8"] if not rank.num.fp8_latents and fits(fp8) else []
        pages = 0 if shrink else config.pages_per_sequence - 1
        pages = _most(pages, lambda p: fits(rank, replace(config, max_model_len=p * PAGE_SIZE)))
        ways += [f"--max-model-len {pages * PAGE_SIZE}"] if pages else []
    raise UserError(f"a rank needs {gb(wanted.total)} of memory and {gb(free)} are free ({', '.join(lines)}); "
                    f"{' or '.join(ways) or 'more memory'} would do")  # fmt: skip


def with_ranks(rank: RankSpec, ranks: int, asked: AskedLayout = "auto") -> RankSpec:
    """The same run on another number of ranks, in as many lanes."""
    quantised = has_experts(rank.quantised_rows) if rank.num.gemm else None
    experts, _ = choose_experts(rank.args, ranks, asked, quantised=quantised)
    return in_lanes(replace(rank, ranks=ranks, num=replace(rank.num, experts=experts)))


def in_lanes(rank: RankSpec) -> RankSpec:
    """The rank with the MLPs in its lane where all lanes' ranks together cannot share them, as Partition.choose."""
    for within in (False, True) if rank.lanes > 1 else (False,):
        other = replace(rank, num=replace(rank.num, mlps_in_lane=within))
        if partition_error(other) is None:
            return other
    return replace(rank, num=replace(rank.num, mlps_in_lane=False))


def partition_error(rank: RankSpec) -> str | None:
    """Why the model does not divide over its ranks, in Partition's words; None if it does."""
    try:
        rows, within = rank.quantised_rows, rank.num.mlps_in_lane
        Partition(rank.args, rank.ranks, rank.experts, rows, lanes=rank.lanes, mlps_in_lane=within)
    except UserError as e:
        return re.sub(r" \(it works with [^)]*\)", "", str(e))
    return None


def gb(n: float) -> str:
    return f"{n / 1e9:.2f} GB"
