"""Pipeline stages: runs of layers, each computed by ranks of its own."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from core.config import ModelArgs
from core.errors import UserError


class Stage(NamedTuple):
    """What one stage of a pipeline has of a model: some layers; the first also the embedding, the last also the norm,
    the head, the MTP module and, for that or a tied head, the embedding."""

    layers: range
    is_first: bool = True
    is_last: bool = True

    def has(self, name: str, mtp: bool, tied: bool) -> bool:
        """Whether a tensor, by our name, is in it. `mtp`: the MTP module is loaded; `tied`: the head is the
        embedding."""
        top, _, rest = name.partition(".")
        if top == "layers":
            return int(rest.partition(".")[0]) in self.layers
        if top == "embed":
            return self.is_first or (self.is_last and (mtp or tied))
        return self.is_last

    def files_have(self, name: str) -> bool:
        """Whether a tensor, by our name, is in files that were converted for it: each tensor is in one stage's."""
        return self.has(name, mtp=False, tied=False)


def single_stage(args: ModelArgs) -> Stage:
    """The only stage of a model that is not divided."""
    return Stage(range(args.n_layers))


def cut(counts: Sequence[int]) -> list[Stage]:
    """Stages of so many layers each, in order."""
    starts = [0, *itertools.accumulate(counts)]
    last = len(counts) - 1
    return [Stage(range(starts[i], starts[i + 1]), i == 0, i == last) for i in range(len(counts))]


def divide(args: ModelArgs, n: int, asked: str | None = None, mtp: bool = False, flag: str = "--pp") -> list[Stage]:
    """The n stages of a model: as many layers each as `asked` says ("20,21,20"), else so that the costliest stage costs
    least. A stage costs the weights that one token is multiplied by.

    Raises UserError, which names the `flag` that asked for n, for more stages than layers, and for numbers that do not
    add up.
    """
    if n > args.n_layers:
        raise UserError(f"{flag} {n}: the model has {args.n_layers} layers, fewer than stages")
    counts = balanced(layer_costs(args), last_cost(args, mtp), n)
    if asked is not None:
        try:
            counts = [int(word) for word in asked.split(",")]
        except ValueError:
            raise UserError(f"--pp-layers {asked}: expected numbers of layers, such as 20,21,20") from None
        if len(counts) != n or sum(counts) != args.n_layers or min(counts) < 1:
            of = f"{n} stage{'s' * (n > 1)} of {args.n_layers} layers"
            raise UserError(f"--pp-layers {asked}: these are {len(counts)} numbers, {sum(counts)} together; "
                            f"expected {of}, at least one in each")  # fmt: skip
    return cut(counts)


def describe_stages(stages: Sequence[Stage], ranks: int) -> str:
    """A line that says which layers each stage has."""
    each = "1 rank" if ranks == 1 else f"{ranks} ranks"
    layers = ", ".join(f"{s.layers.start}-{s.layers.stop - 1}" for s in stages)
    return f"pipeline: {len(stages)} stages of {each}, the last with rank 0 and the head: layers {layers}"


def layer_costs(args: ModelArgs) -> list[int]:
    """Of each layer, the weights that a token is multiplied by: attention's, and the MLP's or the chosen experts'."""
    queries = args.n_heads * args.qk_head_dim
    attention = args.dim * (args.q_lora_rank + args.latent_dim) + (args.q_lora_rank or args.dim) * queries
    attention += args.n_heads * args.kv_lora_rank * (args.qk_nope_head_dim + args.v_head_dim)
    attention += args.n_heads * args.v_head_dim * args.dim
    experts = 3 * args.dim * args.moe_inter_dim * (args.n_activated_experts + args.n_shared_experts)
    experts += args.n_routed_experts * args.dim
    dense = 3 * args.dim * args.inter_dim
    return [attention + (dense if i < args.n_dense_layers else experts) for i in range(args.n_layers)]


def last_cost(args: ModelArgs, mtp: bool) -> int:
    """What the last stage has beside layers: the head, and the MTP module, which uses it again."""
    head = args.vocab_size * args.dim
    return head + (layer_costs(args)[-1] + 2 * args.dim**2 + head if mtp else 0)


def stage_costs(args: ModelArgs, stages: Sequence[Stage], mtp: bool) -> list[int]:
    """What each stage costs, as `divide` counts."""
    costs, last = layer_costs(args), last_cost(args, mtp)
    return [sum(costs[i] for i in stage.layers) + (last if stage.is_last else 0) for stage in stages]


def balanced(costs: Sequence[int], last: int, n: int) -> list[int]:
    """How many layers, in order, each of n stages has, at least one, so that the costliest costs least; `last` is added
    to the last. Of equals those with more layers in the earlier stages."""
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    total = len(costs)
    # best[k][i]: the least that the costliest of k stages of the first i layers can cost, and where the last begins
    best = [[(0.0, 0)] + [(float("inf"), 0)] * total]
    for k in range(1, n + 1):
        row = [(float("inf"), 0)] * (total + 1)
        for i in range(k, total + 1):
            more = last if k == n else 0
            row[i] = min((max(best[k - 1][j][0], sums[i] - sums[j] + more), -j) for j in range(k - 1, i))
        best.append(row)
    counts, i = [], total
    for k in range(n, 0, -1):
        j = -best[k][i][1]
        counts.append(i - j)
        i = j
    return counts[::-1]
