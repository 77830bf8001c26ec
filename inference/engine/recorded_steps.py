"""Decode steps on a CPU, recorded as lists of calls (ops/cpu/captured_calls.py), each shape when it first comes.

Shapes are exact, unlike those of graphs.py: padding tokens would read experts of their own. Recording costs nothing at
start. Only steps of few tokens are recorded: with many, Python takes a small part of a step, and a recording keeps all
its tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from core.batch import Batch, BatchBounds, SequenceSlice
from core.run_config import PAGE_SIZE, RunConfig
from engine.graphs import Forward, Replayed
from engine.rank_memory import RankSpec, in_blocks
from engine.sampling import greedy
from engine.step_memory import step_bytes
from ops.cpu.captured_calls import CapturedCalls, Scratch, UncapturableError

ROWS = 8  # tokens of a step, up to which it is recorded


def records(rank: RankSpec, run: RunConfig) -> bool:
    """Whether decode steps are recorded as calls: those of the kernels in C, on one rank. The reference, which serves
    FP8 latents and batch-invariant mode, reads lengths from tensors."""
    in_c = rank.compiled and not (rank.num.batch_invariant or rank.num.fp8_latents or rank.num.gemm == "fp8")
    return in_c and rank.ranks == run.pp == 1 and not run.eager


def widths(run: RunConfig) -> list[int]:
    """The numbers of tokens per sequence that are recorded: one, or one and its drafts."""
    return sorted({1, 1 + run.mtp})


def scratch_bytes(rank: RankSpec, run: RunConfig) -> int:
    """An upper bound, in bytes, of the scratch memory of one call in a recorded step."""
    few = min(run.max_num_seqs, max(ROWS // (1 + run.mtp), 1))
    return step_bytes(rank, replace(run, max_num_seqs=few), decode=True)


def kept_bytes(rank: RankSpec, run: RunConfig) -> int:
    """An upper bound, in bytes, of the tensors that all recorded shapes keep: activations in all layers, and logits."""
    args, b, n = rank.args, rank.num.dtype.itemsize, rank.args.n_heads
    inner = max(args.inter_dim, args.n_shared_experts * args.moe_inter_dim)
    queries = n * (args.qk_head_dim + 2 * args.qk_rope_head_dim + args.v_head_dim) + 2 * args.q_lora_rank
    layer = b * (8 * args.dim + 3 * in_blocks(inner) + in_blocks(queries) + in_blocks(args.latent_dim))
    layer += 4 * args.n_routed_experts + 12 * args.n_activated_experts
    row = 5 * args.vocab_size + 8 * b * args.dim + 64 * args.qk_rope_head_dim + 1024
    row = (args.n_layers * layer + row) + (layer + row if run.mtp else 0)  # of a step, and of its draft
    shapes = [(sequences, width) for width in widths(run) for sequences in range(1, ROWS // width + 1)]
    return sum(sequences * (width * row + 8 * run.pages_per_sequence + 128) for sequences, width in shapes)


class Recorded(NamedTuple):
    """One shape's calls, the tensors that they read of a step, and what they leave."""

    calls: CapturedCalls
    batch: Batch
    hidden: torch.Tensor | None  # (T, H)
    result: Replayed


class RecordedSteps:
    """One forward, replayed for steps of at most ROWS tokens, as many of each sequence."""

    def __init__(
        self, forward: Forward, run: RunConfig, scratch: Scratch, head: Callable[[torch.Tensor], torch.Tensor]
    ):
        """`scratch`: shared by all forwards of an engine; `head`: hidden states (rows, H) to logits (rows, V)."""
        self.forward, self.n_pages, self.widths = forward, run.pages_per_sequence, widths(run)
        self.scratch, self.head = scratch, head
        self._shapes: dict[tuple[int, int], Recorded] = {}
        self.capturable = True

    def fit(self, slices: Sequence[SequenceSlice]) -> bool:
        """Whether a step of these sequences is recorded, or can be."""
        width = len(slices[0][0]) if slices else 0
        return (
            self.capturable
            and width in self.widths
            and len(slices) * width <= ROWS
            and all(len(tokens) == width and len(pages) <= self.n_pages for tokens, _, pages in slices)
        )

    def fitting(self, slices: Sequence[SequenceSlice]) -> int:
        """Always 0: a step that is replayed in part would read the weights twice."""
        return 0

    @torch.inference_mode()
    def run(self, slices: list[SequenceSlice], hidden: torch.Tensor | None = None, n: int = 0) -> Replayed:
        """The forward on a step's sequences, which must fit; hidden (T, H): input hidden states, one for each token."""
        step, shape = Batch.pack(slices), (len(slices), len(slices[0][0]))
        recorded = self._shapes.get(shape)
        if recorded is None:
            try:
                self._shapes[shape] = self._record(step, hidden)
                return self._shapes[shape].result
            except UncapturableError:
                self.capturable = False
                out = self.forward(step, hidden)
                return Replayed(out, None, None, list(range(len(out))))
        _copy_into(recorded.batch, step)
        if recorded.hidden is not None:
            assert hidden is not None
            recorded.hidden.copy_(hidden)
        recorded.calls.replay()
        return recorded.result

    def close(self) -> None:
        """Frees what was recorded."""
        self._shapes.clear()

    def _record(self, step: Batch, hidden: torch.Tensor | None) -> Recorded:
        """This step's forward, on tensors of its own."""
        pages = step.pages.new_zeros(len(step.pages), self.n_pages)
        longest, whole = self.n_pages * PAGE_SIZE, step.whole
        bounds = BatchBounds(whole.n, whole.tokens, whole.longest_q, longest, whole.n * longest)
        batch = replace(step, pages=pages, decode=bounds)
        _copy_into(batch, step)
        states = None if hidden is None else hidden.clone()
        with CapturedCalls(self.scratch).active() as calls:
            out = self.forward(batch, states)
            logits = self.head(out)
            choice = greedy(logits)
        return Recorded(calls, batch, states, Replayed(out, logits, choice, list(range(len(out)))))


def _copy_into(batch: Batch, step: Batch) -> None:
    for name in ("tokens", "positions", "slots", "kv_lens"):
        getattr(batch, name).copy_(getattr(step, name))
    batch.pages[:, : step.pages.shape[1]] = step.pages
