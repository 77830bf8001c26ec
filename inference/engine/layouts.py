"""Layouts of a number of ranks, data-parallel lanes times the ranks of each: what a step sends, how fast it can be at
most, and which layout is the best for a load. All is counted; nothing runs.

A step's bound adds up what runs one after the other: linear layers and attention, each as long as reading its bytes or
its operations take, whichever is more, and the exchange. Latencies, launches and what chips do not reach are left out.
Sizes are bytes, times seconds.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from core.config import BLOCK_SIZE
from core.numerics import Numerics
from core.run_config import PAGE_SIZE, AskedLayout, ExpertLayout, RunConfig
from engine import memory
from engine.rank_memory import EMBEDDING, HEAD, ROUTED, RankSpec, decode_reads, weight_bytes


class Links(NamedTuple):
    """What a rank sends a second, to others of its node and to other nodes, and how many ranks a node has. Ranks of a
    lane are neighbours: a lane lies within a node, if it fits."""

    nvlink: float
    network: float
    ranks_per_node: int


class Chip(NamedTuple):
    """What a rank's device does a second: bytes it reads, and operations (a multiplication and an addition are two)."""

    bandwidth: float
    fp8: float
    bf16: float


@dataclass(frozen=True)
class Layout:
    """A rank of a layout, with its weights as weight_bytes counts them."""

    rank: RankSpec
    weights: dict[tuple[bool, str], int]

    @property
    def mlps_in_lane(self) -> bool:
        return self.rank.num.mlps_in_lane

    @property
    def name(self) -> str:
        return f"--dp {self.rank.lanes} --tp {self.rank.tp}, experts {self.rank.experts}"


def layouts(rank: RankSpec, world: int, asked: AskedLayout = "auto") -> Iterator[Layout | tuple[int, str]]:
    """Every layout of `world` ranks; in place of one that does not divide the model the number of its lanes and the
    reason. Layouts of split experts come first."""
    experts: tuple[ExpertLayout, ...] = ("split", "whole") if asked == "auto" else (asked,)
    for lanes in (n for n in range(1, world + 1) if world % n == 0):
        found: list[Layout] = []
        problem = ""
        for kind in experts if world > 1 else ("whole",):
            other = memory.in_lanes(replace(rank, ranks=world, lanes=lanes, num=replace(rank.num, experts=kind)))
            if error := memory.partition_error(other):
                problem = problem or error
            else:
                found.append(Layout(other, weight_bytes(other)))
        yield from found
        if not found:
            yield lanes, problem


# --------------------------------------------------------------------------------------------------------------------
# What ranks send each other
# --------------------------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """A collective that the model calls. `nbytes`: of an all_reduce the tensor; of a gather a rank's part, which all
    others get; of a scatter_sum what every other rank gets."""

    what: str
    collective: Literal["all_reduce", "gather", "scatter_sum"]
    group: Literal["tp", "dp"]  # the ranks of a lane, or those of one number in all lanes
    nbytes: int


def row_bytes(rank: RankSpec, experts: bool) -> int:
    """What lanes send of a token before the feed-forward layer: for W8A8 FP8 values and a float32 scale for each 128,
    otherwise the activations; for experts also K weights (float32) and ids (int64)."""
    args = rank.args
    w8a8 = rank.num.gemm == "fp8"
    x = args.dim + -(-args.dim // BLOCK_SIZE) * 4 if w8a8 else args.dim * rank.num.dtype.itemsize
    return x + 12 * args.n_activated_experts * experts


def messages(layout: Layout, rows: int, sampled: int, mtp: bool = False) -> Iterator[Message]:
    """Those of one forward, in the model's order, of which each lane has so many rows and `sampled` rows of logits (the
    rows of the lane with the most, to which the others fill theirs up). `mtp`: of the MTP module instead. What a stage
    gives to the next is no collective (see stage_layouts.py)."""
    rank, args, stage = layout.rank, layout.rank.args, layout.rank.layers
    embedded, logits = rows * args.dim * rank.num.dtype.itemsize, sampled * args.vocab_size // rank.tp * 4
    ends = Message("embedding", "all_reduce", "tp", embedded), Message("logits", "gather", "tp", logits)
    dense = 0 if mtp else args.n_dense_layers
    layers = (layer_messages(layout, rows, i >= dense) for i in (range(1) if mtp else stage.layers))
    first, last = ends[: stage.is_first or mtp], ends[1:] if stage.is_last else ()
    for message in (*first, *itertools.chain.from_iterable(layers), *last):
        if group_size(rank, message) > 1 and message.nbytes:
            yield message


def layer_messages(layout: Layout, rows: int, experts: bool) -> list[Message]:
    """Those of one layer, with experts or with a dense MLP, some of them perhaps among one rank."""
    rank = layout.rank
    state = rows * rank.args.dim * sum_bytes(rank.num)
    exchange = [
        Message("gather", "gather", "dp", rows * row_bytes(rank, experts)),
        Message("scatter_sum", "scatter_sum", "dp", state),
    ]
    return [
        Message("attention", "all_reduce", "tp", state),
        *(exchange if experts or not layout.mlps_in_lane else []),
        Message("feed-forward", "all_reduce", "tp", state),
    ]


def sum_bytes(num: Numerics) -> int:
    """Of a value that ranks sum: that of virtual ranks is float32."""
    return 4 if num.virtual_ranks > 1 else num.dtype.itemsize


def group_size(rank: RankSpec, message: Message) -> int:
    return rank.tp if message.group == "tp" else rank.lanes


def sent(rank: RankSpec, message: Message) -> float:
    """Bytes a rank sends: of a sum those of a ring or of a reduce-scatter and gather, which are the same."""
    size = group_size(rank, message)
    return message.nbytes * (2 * (size - 1) / size if message.collective == "all_reduce" else size - 1)


def layer_sent(layout: Layout, rows: int) -> float:
    """What a rank sends in one layer with experts."""
    return sum(sent(layout.rank, message) for message in layer_messages(layout, rows, True))


def seconds(rank: RankSpec, message: Message, links: Links) -> float:
    """How long a message takes at least where every rank has its own link to other nodes: sums and gathers as NCCL's
    do, a node's ranks sharing what crosses; scatter_sum sends to each rank directly."""
    size = group_size(rank, message)
    stride = 1 if message.group == "tp" else rank.tp
    near = min(size, max(links.ranks_per_node // stride, 1))  # ranks of the group in one node
    nodes = -(-size // near)
    n = message.nbytes
    if message.collective == "all_reduce":
        within, across = 2 * (near - 1) / near * n, 2 * (nodes - 1) / nodes * n / near
    elif message.collective == "gather":
        within, across = (near - 1) * nodes * n, (nodes - 1) * n
    else:
        within, across = (near - 1) * n, (size - near) * n
    return within / links.nvlink + across / links.network


# --------------------------------------------------------------------------------------------------------------------
# How fast a step can be
# --------------------------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """A step of all lanes at its fastest. Times are a rank's."""

    sequences: int
    tokens: int  # that it computes, of all lanes
    read: int  # weights and latents
    sent: float  # by a rank
    sent_layer: float  # in one layer with experts
    linear: float
    attention: float
    exchange: float

    @property
    def seconds(self) -> float:
        return self.linear + self.attention + self.exchange


def linear_operations(layout: Layout, rows: int, gathered: int, sampled: int, mtp: bool = False) -> float:
    """A rank's in linear layers, with `rows` tokens of its lane and `gathered` of all; with whole experts the mean
    rank's. `mtp`: the MTP module's instead of the main model's."""
    rank, args = layout.rank, layout.rank.args
    total = 0.0
    for kind, n in rank.kinds.items():
        size, spec = n * 2.0, kind.spec
        for length in spec.shape:
            size *= length
        if len(spec.shape) < 2 or kind.part == EMBEDDING or (kind.part == HEAD and kind.mtp):
            continue
        if kind.part == HEAD:
            total += size * sampled / rank.tp
        elif kind.mtp == mtp:
            if kind.part == ROUTED:
                total += size * gathered * args.n_activated_experts / args.n_routed_experts / rank.ranks
            elif spec.inner and not layout.mlps_in_lane:
                total += size * gathered / rank.ranks
            else:
                total += size * rows / (rank.tp if spec.split is not None else 1)
    if args.tie_word_embeddings and rank.layers.is_last:
        total += 2.0 * args.vocab_size * args.dim * sampled / rank.tp
    return total


def attention_operations(rank: RankSpec, rows: int, context: float, layers: int, absorbed: bool) -> float:
    """A rank's in products of queries with keys and of scores with values, which are latents if absorbed."""
    args = rank.args
    widths = args.latent_dim + args.kv_lora_rank if absorbed else args.qk_head_dim + args.v_head_dim
    return 2.0 * rows * context * layers * args.n_heads / rank.tp * widths


def decode_bound(layout: Layout, sequences: int, context: int, drafts: int, chip: Chip, links: Links) -> Bound:
    """A step that decodes so many sequences, spread evenly over the lanes, at `context` tokens each. With drafts, each
    sequence has 1 + drafts tokens, and the MTP module runs once for each draft."""
    rank = layout.rank
    lane = -(-sequences // rank.lanes)
    read = decode_reads(rank, sequences, context, drafts, layout.weights)
    forwards = [(1 + drafts, False)]
    if rank.layers.is_last:
        forwards += ((1 + drafts if k == 0 else 1, True) for k in range(drafts))
    operations = attention = exchange = total = 0.0
    for width, mtp in forwards:
        sampled = lane if mtp else lane * width
        operations += linear_operations(layout, lane * width, sequences * width, sampled, mtp)
        layers = 1 if mtp else len(rank.layers.layers)
        attention += attention_operations(rank, lane * width, context, layers, absorbed=True)
        for message in messages(layout, lane * width, sampled, mtp):
            exchange += seconds(rank, message, links)
            total += sent(rank, message)
    return Bound(
        sequences, sequences * (1 + drafts), read.weights + read.latents,
        total, layer_sent(layout, lane * (1 + drafts)),
        max(read.weights / chip.bandwidth, operations / (chip.fp8 if rank.num.gemm == "fp8" else chip.bf16)),
        max(read.latents / chip.bandwidth, attention / chip.bf16), exchange,
    )  # fmt: skip


def prefill_bound(layout: Layout, tokens: int, length: int, chip: Chip, links: Links) -> Bound:
    """A step that computes `tokens` tokens of every lane, of prompts of that length; half of it is the mean context."""
    rank = layout.rank
    weights = sum(n for (mtp, part), n in layout.weights.items() if not mtp and part != EMBEDDING)
    prompts = -(-tokens // length)
    operations = linear_operations(layout, tokens, tokens * rank.lanes, prompts)
    attention = attention_operations(rank, tokens, length / 2, len(rank.layers.layers), absorbed=False)
    found = list(messages(layout, tokens, prompts))
    return Bound(
        prompts * rank.lanes, tokens * rank.lanes, weights,
        sum(sent(rank, m) for m in found), layer_sent(layout, tokens),
        max(weights / chip.bandwidth, operations / (chip.fp8 if rank.num.gemm == "fp8" else chip.bf16)),
        attention / chip.bf16, sum(seconds(rank, m, links) for m in found),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Which layout
# --------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a layout can do. Tokens and sequences are those of all lanes."""

    layout: Layout
    weights: int
    tokens: int  # of cache
    most_sequences: int
    decode: Bound | None  # None: not one sequence fits
    prefill: Bound | None
    stages: int = 1  # of a pipeline; the layout is that of the one whose rank has the most weights

    @property
    def name(self) -> str:
        return f"--pp {self.stages}" if self.stages > 1 else f"--dp {self.layout.rank.lanes}"


def evaluate(
    layout: Layout, config: RunConfig, size: int, context: int, concurrency: int | None, chip: Chip, links: Links
) -> Row:
    """A layout with `size` bytes of memory a rank, for sequences of `context` tokens: as many as are asked for, or as
    many as fit if those are fewer or nobody asks. max_num_batched_tokens is a lane's."""
    rank = layout.rank
    weights = sum(layout.weights.values())
    config = replace(config, max_model_len=context)
    most = memory.sequences_that_fit(rank, config, size - weights)
    pages = memory.pages_that_fit(rank, replace(config, max_num_seqs=max(most, 1)), size - weights)
    tokens = pages * PAGE_SIZE * rank.lanes
    if not most:
        return Row(layout, weights, tokens, 0, None, None)
    sequences = min(most * rank.lanes, concurrency or most * rank.lanes)
    decode = decode_bound(layout, sequences, context, config.mtp, chip, links)
    prefill = prefill_bound(layout, config.max_num_batched_tokens, context, chip, links)
    return Row(layout, weights, tokens, most * rank.lanes, decode, prefill)


def recommend(rows: Iterable[Row], concurrency: int) -> tuple[Row, str] | None:
    """The layout whose bound on decoding is the highest, and why in one line; None if none holds a sequence.
    Whole experts must be faster by more than 1 %, as their ranks are not equally busy."""
    fit = [row for row in rows if row.decode is not None]
    if not fit:
        return None
    best = max(fit, key=lambda row: speed(row) * (1.01 if row.layout.rank.experts == "split" else 1))
    same = [row for row in fit if row.layout.rank.experts == best.layout.rank.experts] or fit
    others = [row for row in same if row.name != best.name]
    if not others:
        return best, "the only layout that fits"
    divided = max(best.layout.rank.lanes, best.stages) > 1
    other = min(others, key=lambda row: (row.layout.rank.lanes, row.stages)) if divided else max(others, key=speed)
    return best, _why(best, other, concurrency)


def speed(row: Row) -> float:
    """Tokens a second of one step's sequences, one each."""
    return row.decode.sequences / row.decode.seconds if row.decode else 0.0


def _why(best: Row, other: Row, concurrency: int) -> str:
    a, b = best.decode, other.decode
    assert a is not None and b is not None
    said = f"at most {speed(best):,.0f} tokens/s, {speed(best) / speed(other):.1f} times those of {other.name}"
    if b.sequences < min(a.sequences, concurrency):
        return f"{said}, whose memory holds {b.sequences:,} of {concurrency:,} sequences"
    busy, its = a.linear + a.attention, b.linear + b.attention
    if a.read < b.read and its - busy >= b.exchange - a.exchange:
        return f"{said}: a rank reads {a.read / 1e9:.1f} GB a step, not {b.read / 1e9:.1f}"
    if its - busy >= b.exchange - a.exchange:
        return f"{said}: a rank computes for {busy * 1e3:.2f} ms a step, not {its * 1e3:.2f}"
    return f"{said}: a rank exchanges for {a.exchange * 1e3:.2f} ms a step, not {b.exchange * 1e3:.2f}"
