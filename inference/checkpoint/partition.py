"""How weights are divided over ranks: chosen once for a run or a conversion, and passed on as a `Partition`."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from checkpoint.table import BLOCK, DENSE, EXPERT, MOE, Row, Spec, sizes
from core.config import BLOCK_SIZE, ModelArgs
from core.errors import UserError
from core.run_config import AskedLayout, ExpertLayout

Ranges = tuple[tuple[int, int], ...]  # [start, stop) in each dimension of a tensor


@dataclass(frozen=True)
class Partition:
    """The part of each tensor that each of `ranks` ranks holds.

    With data-parallel lanes, each of `tp` ranks, a lane's ranks share embedding, head and attention, and all lanes'
    ranks share the MLPs and the experts; with `mlps_in_lane` only the routed experts, and a lane's ranks share the
    dense MLPs and shared experts too. Rank r is number r % tp of lane r // tp.

    Raises UserError unless the lanes divide the ranks, heads, vocabulary, widths and experts divide by the ranks that
    share them and, where weights stay quantised, each part consists of whole blocks that share a scale. The message
    lists the numbers of ranks that work with as many lanes, and the other layout of the experts if that one does.
    """

    args: ModelArgs
    ranks: int = 1  # of all lanes
    experts: ExpertLayout = "whole"
    quantised: frozenset[str] | bool = False  # the rows of the table that stay so; True: all that can be
    reason: str = field(default="", compare=False)  # one line for people: why the experts have this layout
    lanes: int = 1
    mlps_in_lane: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"the number of ranks is {self.ranks}, expected at least 1")
        if self.lanes < 1 or self.ranks % self.lanes:
            raise UserError(f"--dp {self.lanes} does not divide {self.ranks} ranks")

        def error(ranks: int, experts: ExpertLayout = self.experts) -> str | None:
            return _error(self.args, ranks, experts, self.quantised, self.lanes, self.mlps_in_lane)

        if problem := error(self.ranks):
            counts = range(self.lanes, self.lanes * self.args.n_heads + 1, self.lanes)
            works = ", ".join(str(n) for n in counts if not error(n)) or "none"
            other: ExpertLayout = "whole" if self.experts == "split" else "split"
            hint = "" if error(self.ranks, other) else f"; --experts {other} works"
            lanes = "" if self.lanes == 1 else f" in {self.lanes} lanes"
            raise UserError(f"{problem} (it works with {works}{lanes}){hint}")

    @classmethod
    def choose(
        cls,
        args: ModelArgs,
        ranks: int,
        asked: AskedLayout = "auto",
        converted: ExpertLayout | None = None,
        quantised: frozenset[str] | bool = False,
        quantised_experts: bool | None = None,
        lanes: int = 1,
    ) -> "Partition":
        """The partition that `choose_experts` decides on, with the MLPs in the lanes where all lanes' ranks together
        cannot share them. Raises UserError as both do."""
        experts, reason = choose_experts(args, ranks, asked, converted, quantised_experts)
        try:
            return cls(args, ranks, experts, quantised, reason, lanes)
        except UserError:
            if lanes > 1:
                with contextlib.suppress(UserError):
                    reason += "; dense MLPs and shared experts within each lane"
                    return cls(args, ranks, experts, quantised, reason, lanes, mlps_in_lane=True)
            raise

    @property
    def tp(self) -> int:
        """The ranks of one lane."""
        return self.ranks // self.lanes

    def shard(self, rank: int) -> int:
        """The number of the shard of MLPs and experts that a rank holds. Ranks of one number in their lanes, which
        exchange tokens, hold neighbouring shards."""
        lane, number = divmod(rank, self.tp)
        return number * self.lanes + lane

    def held_experts(self, rank: int) -> range:
        """The numbers of the routed experts that a rank holds, whole or a slice of each."""
        if self.experts == "split":
            return range(self.args.n_routed_experts)
        each, shard = self.args.n_routed_experts // self.ranks, self.shard(rank)
        return range(shard * each, (shard + 1) * each)

    def _shard_of(self, spec: Spec, rank: int) -> tuple[int, int]:
        """Which of how many equal parts of a tensor a rank holds, if it is split."""
        if spec.inner and not (self.mlps_in_lane and spec.expert is None):
            return self.shard(rank), self.ranks
        return rank % self.tp, self.tp

    def cut(self, spec: Spec, rank: int) -> Ranges | None:
        """The part of a tensor that a rank holds; None where it holds nothing of it."""
        if spec.expert is not None and spec.expert not in self.held_experts(rank):
            return None
        split = spec.split if spec.expert is None or self.experts == "split" else None
        part, parts = self._shard_of(spec, rank)
        return tuple(
            (part * (n // parts), (part + 1) * (n // parts)) if d == split else (0, n) for d, n in enumerate(spec.shape)
        )


def file_rank(spec: Spec, of: Partition, part: int, files: Partition) -> int:
    """The rank of `files` whose part of a tensor has in it part number `part` of `of`, which is no coarser."""
    if files.experts == "whole" and spec.expert is not None:
        return spec.expert // (files.args.n_routed_experts // files.ranks)
    number, parts = of._shard_of(spec, part)
    return number * files.ranks // parts


def choose_files(made_for: Iterable[int], ranks: int, lanes: int = 1) -> int | None:
    """Of conversions for these numbers of ranks, the one that a run reads: for its own number, else for the most of
    which each holds all that some of its ranks do; None if there is none."""
    tp = ranks // lanes
    fitting = [n for n in made_for if tp % n == 0 or (n, lanes) == (ranks, 1)]
    return max(fitting, default=None)


def choose_experts(
    args: ModelArgs,
    ranks: int,
    asked: AskedLayout = "auto",
    converted: ExpertLayout | None = None,
    quantised: bool | None = None,
) -> tuple[ExpertLayout, str]:
    """The layout of the routed experts, and one line that gives the reason.

    Files that were converted for ranks decide it: `converted` is their layout. Otherwise "auto" splits the experts
    where their inner width divides by the ranks, into whole blocks if they are stored `quantised` (None: if the
    checkpoint is). One token reads
    8 experts, 352 MB of FP8 in a layer of V3. Split over 8 ranks, that is 44 MB on each. Whole, the experts lie on at
    most 4 ranks, and all ranks wait for the busiest, which reads at least two of them, 88 MB. With many tokens every
    rank reads all it holds in either layout.

    Raises UserError when another layout than that of the files is asked for.
    """
    if converted is not None:
        if asked not in ("auto", converted) and ranks > 1:
            way_out = f"convert again, or --experts {converted}"
            raise UserError(f"--experts {asked}, but the files hold {converted} experts: {way_out}")
        return converted, f"experts: {converted}, as the files were converted"
    if asked != "auto":
        return asked, f"experts: {asked}, as asked"
    width, quantised = args.moe_inter_dim, args.is_quantised if quantised is None else quantised
    if ranks <= 1:
        return "whole", "experts: whole, on one rank"
    if width % (ranks * (args.weight_block[1] if quantised else 1)):
        how = f"in whole {_blocks(args)}" if quantised else "evenly"
        return "whole", f"experts: whole, as {ranks} ranks cannot share their width of {width} {how}"
    return "split", f"experts: split, a rank has {width // ranks} of each one's width of {width}"


def _blocks(args: ModelArgs) -> str:
    """What is cut in wholes only, in words."""
    kind = {"int8": "INT8", "int4": "INT4"}.get(args.dtype, "FP8")
    return f"groups of {args.group_size} channels" if args.group_size else f"{BLOCK_SIZE}-wide {kind} blocks"


def _error(
    args: ModelArgs,
    ranks: int,
    experts: ExpertLayout,
    quantised: frozenset[str] | bool,
    lanes: int,
    mlps_in_lane: bool,
) -> str | None:
    """Why the model does not divide over the ranks, by its config's names and without the ways out; None if it does."""
    size, tp = sizes(args), ranks // lanes
    of_a_lane = f"{tp} ranks" if lanes == 1 else f"a lane's {tp} ranks"
    for name, count in {"n_heads": args.n_heads, "vocab_size": args.vocab_size}.items():
        if count % tp:
            return f"{args.names.get(name, name)} {count} does not divide by {of_a_lane}"
    of_all = f"{ranks} ranks"
    mlps, of_mlps = (tp, of_a_lane) if mlps_in_lane else (ranks, of_all)
    counts = {"inter_dim": (args.inter_dim, mlps, of_mlps)} if args.n_dense_layers else {}
    if args.n_moe_layers or args.n_mtp_layers:
        if experts == "whole":
            counts["n_routed_experts"] = args.n_routed_experts, ranks, of_all
        counts["the shared experts' width"] = size["S"], mlps, of_mlps
        if experts == "split":
            counts["moe_inter_dim"] = args.moe_inter_dim, ranks, of_all
    for name, (count, sharers, text) in counts.items():
        if count % sharers:
            return f"{args.names.get(name, name)} {count} does not divide by {text}"
    if not quantised or ranks == 1:
        return None

    def stays(row: Row) -> bool:
        return row.quantised if quantised is True else row.ours in quantised

    blocks = f"cannot share in whole {_blocks(args)}"
    for row in (*BLOCK, *(DENSE if args.n_dense_layers else ()), *MOE):
        parts, text = (mlps, of_mlps) if row.inner else (tp, of_a_lane)
        if stays(row) and row.split is not None and _width(row, size) // parts % args.weight_block[row.split]:
            dimension = ("rows", "columns")[row.split]
            name = (row.hf if args.names else row.ours).removesuffix(".weight")
            return f"{name} has {_width(row, size)} {dimension}, which {text} {blocks}"
    if any(map(stays, EXPERT)) and "moe_inter_dim" in counts and args.moe_inter_dim // ranks % args.weight_block[1]:
        width = f"{args.names.get('moe_inter_dim', 'moe_inter_dim')} is {args.moe_inter_dim}"
        return f"{width}, which {ranks} ranks {blocks}"
    return None


def _width(row: Row, size: dict[str, int]) -> int:
    """Of a tensor, along the dimension that ranks split."""
    assert row.split is not None
    return size[row.shape[row.split]]
