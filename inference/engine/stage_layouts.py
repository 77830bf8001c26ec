"""A pipeline as a layout of ranks: what its stages give each other, and how fast it can be at most. All is counted.

Each stage computes another microbatch at the same time, and all wait for the slowest before they exchange. So a step
of all sequences, in which each microbatch goes through every stage, takes the slowest stage's time once for each
microbatch; of fewer microbatches than stages at least the time of all stages, one after another.
"""

from collections.abc import Sequence
from dataclasses import replace

from core.run_config import PAGE_SIZE, RunConfig
from core.stages import Stage
from engine import memory
from engine.layouts import Bound, Chip, Layout, Links, Row, decode_bound, prefill_bound
from engine.rank_memory import RankSpec, weight_bytes


def on_stages(rank: RankSpec, stages: Sequence[Stage]) -> list[RankSpec]:
    """A rank of each stage. `rank`: of the ranks of one."""
    return [replace(rank, stage=stage if len(stages) > 1 else None) for stage in stages]


def boundary_bytes(rank: RankSpec, rows: int) -> int:
    """What each rank of a stage gives of so many tokens to its neighbour in the next: their hidden states, whole."""
    return 0 if rank.layers.is_last else rows * rank.args.dim * rank.num.dtype.itemsize


def evaluate(
    ranks: Sequence[RankSpec],
    config: RunConfig,
    size: int,
    context: int,
    concurrency: int | None,
    chip: Chip,
    links: Links,
) -> Row:
    """A pipeline of these ranks, one of each stage, as layouts.evaluate has others; config.pp is their number."""
    stages = [Layout(rank, weight_bytes(rank)) for rank in ranks]
    weights = [sum(stage.weights.values()) for stage in stages]
    heaviest, n = stages[weights.index(max(weights))], len(stages)
    config = replace(config, max_model_len=context)
    most = min(memory.sequences_that_fit(s.rank, config, size - w) for s, w in zip(stages, weights, strict=True))
    asked = replace(config, max_num_seqs=max(most, 1))
    pages = min(memory.pages_that_fit(s.rank, asked, size - w) for s, w in zip(stages, weights, strict=True))
    tokens = pages // n * n * PAGE_SIZE
    if not most:
        return Row(heaviest, max(weights), tokens, 0, None, None, n)
    sequences = min(most, concurrency or most)
    microbatches = min(sequences, n)
    rows, chunk = -(-sequences // n), config.max_num_batched_tokens
    near = n * heaviest.rank.ranks <= links.ranks_per_node
    link = links.nvlink if near else links.network

    def with_boundary(stage: Layout, bound: Bound, rows: int) -> Bound:
        given = boundary_bytes(stage.rank, rows)
        return bound._replace(sent=bound.sent + given, exchange=bound.exchange + given / link)

    decodes = [with_boundary(s, decode_bound(s, rows, context, config.mtp, chip, links), rows * (1 + config.mtp))
               for s in stages]  # fmt: skip
    prefills = [with_boundary(s, prefill_bound(s, chunk, context, chip, links), chunk) for s in stages]
    decode = _together(decodes, microbatches)._replace(sequences=sequences, tokens=sequences * (1 + config.mtp))
    prefill = max(prefills, key=lambda bound: bound.seconds)  # of every stage's step one chunk comes out
    return Row(heaviest, max(weights), tokens, most, decode, prefill, n)


def _together(stages: Sequence[Bound], microbatches: int) -> Bound:
    """What so many microbatches take in all stages together: bounds are of one microbatch in each stage."""
    slowest = max(stages, key=lambda bound: bound.seconds)
    passed = [slowest] * microbatches
    if sum(bound.seconds for bound in stages) > slowest.seconds * microbatches:
        passed = list(stages)
    return slowest._replace(
        read=sum(bound.read for bound in passed), sent=sum(bound.sent for bound in passed),
        linear=sum(bound.linear for bound in passed), attention=sum(bound.attention for bound in passed),
        exchange=sum(bound.exchange for bound in passed),
    )  # fmt: skip
