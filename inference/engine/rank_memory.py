"""What a rank keeps in memory, tensor by tensor: weights and latents, and the bytes of them a decode step reads.

Weights are counted from checkpoint/table.py's table, in the form in which they stay in memory. Nothing is allocated.
Sizes are bytes unless said.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from checkpoint.partition import Partition
from checkpoint.table import Spec, expected_tensors, module_of, quantised_rows
from core.config import BLOCK_SIZE, ModelArgs
from core.numerics import FLOAT32, PLAIN, Form, Numerics
from core.run_config import PAGE_SIZE, ExpertLayout
from core.stages import Stage, single_stage
from ops import formats
from ops.cpu import kernels as kernel_cpu

EMBEDDING, HEAD, ATTENTION, DENSE = "embedding", "head", "attention", "dense MLPs"
ROUTED, SHARED, SMALL, MTP = "routed experts", "shared experts", "router, norms", "MTP module"
PARTS = (EMBEDDING, HEAD, ATTENTION, DENSE, ROUTED, SHARED, SMALL)


@dataclass(frozen=True)
class RankSpec:
    """One rank of a run, as far as its memory depends on it."""

    args: ModelArgs
    num: Numerics
    ranks: int = 1  # of all lanes
    gpu: bool = True  # a GPU's forms of the ops and weights, else a CPU's
    mtp: bool = False  # the MTP module is loaded, whether or not it drafts
    reference: bool = False  # neither: the reference's forms, on another device
    lanes: int = 1  # data-parallel; each has its own sequences and latents
    stage: Stage | None = None  # of a pipeline; None: the rank has all layers

    @property
    def experts(self) -> ExpertLayout:
        return self.num.experts

    @property
    def tp(self) -> int:
        """The ranks of one lane, which share attention, embedding and head."""
        return self.ranks // self.lanes

    @property
    def layers(self) -> Stage:
        """The stage, or the only one."""
        return self.stage or single_stage(self.args)

    @property
    def mlp_ranks(self) -> int:
        """The ranks that share dense MLPs and shared experts."""
        return self.tp if self.num.mlps_in_lane else self.ranks

    @property
    def inner(self) -> int:
        """A routed expert's width here."""
        return -(-self.args.moe_inter_dim // (self.ranks if self.experts == "split" else 1))

    @property
    def packs(self) -> bool:
        """All projections lie packed as ops/cpu/kernels.c has them."""
        return self.compiled and self.num.gemm != "fp8"

    @property
    def packs_experts(self) -> bool:
        """In some layer routed experts lie so."""
        return self.packs or (self.compiled and any(name.endswith(".experts") for name, _ in self.num.exceptions))

    @property
    def quantised_rows(self) -> frozenset[str]:
        """The rows of the table that stay quantised in memory."""
        return _quantised(self.args, self._forms, self.mtp)

    @property
    def kinds(self) -> "Counter[_Kind]":
        return _kinds(self.args, self._forms, self.mtp, self.stage)

    @property
    def _forms(self) -> Numerics:
        """What the numerics say of weights, alone."""
        return Numerics(gemm=self.num.gemm, projections=self.num.projections, exceptions=self.num.exceptions)

    @property
    def compiled(self) -> bool:
        """The ops are ops/cpu/kernels.c's."""
        return not (self.gpu or self.reference) and kernel_cpu.serve(self.num.dtype)

    @property
    def as_loaded(self) -> bool:
        """Weights stay as they are loaded: only a CPU packs or widens them, and only bfloat16."""
        return self.gpu or self.reference or self.num.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """Weights that are alike: `spec` without its name, as if nothing were quantised, and the form in memory (None: of
    a weight that has no choice)."""

    mtp: bool
    part: str
    leaf: str  # the last two words of the name
    spec: Spec
    form: Form | None


@functools.lru_cache(maxsize=4)
def _quantised(args: ModelArgs, num: Numerics, mtp: bool) -> frozenset[str]:
    return quantised_rows(expected_tensors(args, False, mtp), num)


@functools.lru_cache(maxsize=4)
def _kinds(args: ModelArgs, num: Numerics, mtp: bool, stage: Stage | None) -> Counter[_Kind]:
    """The table's tensors that a stage has, counted by kind: thousands where V3 has 92 thousand names."""
    found: Counter[_Kind] = Counter()
    others, usual = dict(num.exceptions), PLAIN if num.gemm is None else num.projections
    for name, spec in expected_tensors(args, False, mtp).items():
        if stage is not None and not stage.has(name, mtp, args.tie_word_embeddings):
            continue
        leaf = ".".join(name.split(".")[-2:])
        form = others.get(module_of(name), None if spec.form is None else usual)
        found[_Kind(name.startswith("mtp."), _part(name, leaf), leaf, spec._replace(hf="", form=None), form)] += 1
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
    with what they scale, and the zeros between stacked projections with the first of them.

    Unlike on disk, wkv_b is never quantised and norms are float32; a CPU packs projections, and keeps router and head
    for products in float32; a tied head, and the MTP module's copies of embedding and head, do not exist. The packed
    form is filled up to whole panels.
    """
    found: Counter[tuple[bool, str]] = Counter()
    shard = rank  # whose parts lie apart in memory: a virtual rank's in the deterministic mode
    if rank.num.virtual_ranks > 1:
        shard = replace(rank, ranks=rank.num.virtual_ranks, lanes=1)
    rows, within = rank.quantised_rows, rank.num.mlps_in_lane
    partition = Partition(rank.args, shard.ranks, rank.experts, rows, lanes=shard.lanes, mlps_in_lane=within)
    for kind, n in rank.kinds.items():
        cut = partition.cut(kind.spec, 0)  # the ranks' parts are equal
        if cut is None:
            continue
        if shard is not rank and (kind.spec.inner or kind.spec.expert is not None):
            n *= shard.ranks // rank.ranks
        elif shard is not rank and (kind.spec.split is not None or _beside_queries(kind.leaf, rank.args)):
            n *= shard.ranks // rank.tp
        found[kind.mtp, kind.part] += n * _held_bytes(kind, tuple(b - a for a, b in cut), shard)
    return dict(found)


def _beside_queries(leaf: str, args: ModelArgs) -> bool:
    """Whether a tensor that is not split is stacked with the queries, which are, and so is in each shard of these."""
    return leaf == "wkv_a.weight" and not args.q_lora_rank


def _held_bytes(kind: _Kind, shape: tuple[int, ...], rank: RankSpec) -> int:
    """What a tensor of which this rank has so much takes in memory; 0 if it is not kept."""
    plain, size = rank.num.dtype.itemsize, math.prod(shape)
    if kind.leaf == "wkv_b.weight":
        return size * plain
    if kind.mtp and kind.part in (EMBEDDING, HEAD):
        return 0
    tied = rank.args.tie_word_embeddings and "head" in dict(rank.num.exceptions)
    if kind.part == EMBEDDING and tied:
        return size * 4
    if kind.part == HEAD or kind.leaf == "gate.weight":
        as_loaded = rank.as_loaded or kind.form == FLOAT32
        if rank.args.tie_word_embeddings and kind.part == HEAD and as_loaded:
            return 0
        if as_loaded:
            return size * (4 if kind.form == FLOAT32 else plain)
        return 2 * kernel_cpu.packed_numbers(*shape) if rank.compiled else size * 4
    if kind.leaf.endswith(".bias") or len(shape) == 1:  # bias and norms
        return size * 4
    if kind.part == EMBEDDING:
        return size * plain
    form = kind.form or PLAIN
    if rank.packs or (rank.compiled and not form.is_quantised):
        return _packed_bytes(kind.leaf, shape, form, rank)
    return _loaded_bytes(kind.leaf, shape, form, plain)


FIRST = ("w1.weight", "wq_a.weight", "wq.weight")  # parts of a projection after which another follows


def _loaded_bytes(leaf: str, shape: tuple[int, ...], form: Form, plain: int) -> int:
    """Of a projection's part (N, K) with its scales and zero points. Parts are filled up to blocks where they meet."""
    n, k = shape
    if not form.is_quantised:
        return n * k * plain
    blocks = math.ceil(n / form.block[0]) * math.ceil(k / form.block[1])
    rows = in_blocks(n, form.block[0]) if leaf in (*FIRST, "w3.weight") else n
    return rows * k // form.packing + blocks * (form.scale.itemsize + form.zeros)


def _packed_bytes(leaf: str, shape: tuple[int, ...], form: Form, rank: RankSpec) -> int:
    """The same as ops/cpu/kernels.c has it: a projection is filled up to panels, which its last part counts."""
    n, k = shape
    if leaf in FIRST:
        return _loaded_bytes(leaf, shape, form, 2)
    before, first = 0, ""
    if leaf == "w3.weight":
        before, first = n, FIRST[0]
    elif leaf == "wkv_a.weight":
        before, first = rank.args.q_lora_rank or rank.args.n_heads // rank.tp * rank.args.qk_head_dim, FIRST[1]
    end = (in_blocks(before, form.block[0]) if form.is_quantised else before) + n
    if leaf == "w3.weight" and form.is_quantised:
        end = in_blocks(end, form.block[0])
    return kernel_cpu.packed_bytes(form, end, k) - (_loaded_bytes(first, (before, k), form, 2) if before else 0)


def in_blocks(n: int, block: int = BLOCK_SIZE) -> int:
    return -(-n // block) * block


def parameters(rank: RankSpec, mtp: bool = False) -> int:
    """How many weights the main model has, all ranks' together, or the MTP module alone, whose embedding and head are
    the main model's."""
    return sum(n * math.prod(kind.spec.shape) for kind, n in rank.kinds.items()
               if kind.mtp == mtp and kind.spec.required)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Latents
# --------------------------------------------------------------------------------------------------------------------


def latent_bytes(rank: RankSpec, mtp: bool | None = None) -> int:
    """Of one token, all layers together; every rank of its lane keeps the same. `mtp` True or False: the MTP module's
    or the main model's alone."""
    args, num = rank.args, rank.num
    width = args.latent_dim * num.dtype.itemsize
    if num.fp8_latents:
        width = formats.packed_latent_bytes(args.kv_lora_rank, args.qk_rope_head_dim)
    stage = rank.layers
    modules = args.n_mtp_layers if rank.mtp and stage.is_last else 0
    layers = (len(stage.layers) if mtp is not True else 0) + (modules if mtp is not False else 0)
    return layers * width


def page_bytes(rank: RankSpec) -> int:
    return PAGE_SIZE * latent_bytes(rank)


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


def decode_reads(
    rank: RankSpec,
    sequences: int,
    context: int,
    drafts: int = 0,
    weights: dict[tuple[bool, str], int] | None = None,
) -> Read:
    """Every weight once but for the embedding, routed experts as far as somebody chooses them, and the latents of
    `context` tokens a sequence. `sequences` are of all lanes, spread evenly: the tokens of all choose experts; the
    latents are those of a lane with the most sequences. With whole experts per rank this is the mean rank; a step
    waits for the busiest.

    With drafts, each sequence brings 1 + drafts tokens; the MTP module and the head run once more for each draft, the
    module first on all those tokens. `weights`: what weight_bytes says, where it is known.
    """
    args, parts = rank.args, weight_bytes(rank) if weights is None else weights

    def read(mtp: bool, tokens: int) -> float:
        chosen = distinct_experts(args, tokens) / args.n_routed_experts if args.n_routed_experts else 0.0
        return sum(n * (chosen if part == ROUTED else 1) for (of_mtp, part), n in parts.items()
                   if of_mtp == mtp and part != EMBEDDING)  # fmt: skip

    tokens = sequences * (1 + drafts)
    total = read(False, tokens)
    if rank.layers.is_last:
        head = parts.get((False, HEAD), 0) or parts[False, EMBEDDING]
        if not parts.get((False, HEAD)):
            total += head
        for draft in range(drafts):
            total += read(True, sequences if draft else tokens) + head
    of_token = latent_bytes(rank, mtp=False) + drafts * latent_bytes(rank, mtp=True)
    latents = -(-sequences // rank.lanes) * context * of_token
    return Read(distinct_experts(args, tokens), round(total), latents)
