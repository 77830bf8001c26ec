"""How weights are divided over ranks: chosen once for a run or a conversion, and passed on as a `Partition`."""

from dataclasses import dataclass, field

from checkpoint.table import BLOCK, DENSE, EXPERT, MOE, Row, Spec, sizes
from core.config import BLOCK_SIZE, ModelArgs
from core.errors import UserError
from core.run_config import AskedLayout, ExpertLayout

Ranges = tuple[tuple[int, int], ...]  # [start, stop) in each dimension of a tensor


@dataclass(frozen=True)
class Partition:
    """The part of each tensor that each of `ranks` ranks holds.

    Raises UserError unless heads, vocabulary, widths and experts divide by the number of ranks and, where weights stay
    quantised, each part consists of whole blocks that share a scale. The message lists the numbers of ranks that work,
    and the other layout of the experts if that one does.
    """

    args: ModelArgs
    ranks: int = 1
    experts: ExpertLayout = "whole"
    quantised: frozenset[str] | bool = False  # the rows of the table that stay so; True: all that can be
    reason: str = field(default="", compare=False)  # one line for people: why the experts have this layout

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"the number of ranks is {self.ranks}, expected at least 1")
        if error := _error(self.args, self.ranks, self.experts, self.quantised):
            counts = range(1, self.args.n_heads + 1)
            works = (n for n in counts if not _error(self.args, n, self.experts, self.quantised))
            other: ExpertLayout = "whole" if self.experts == "split" else "split"
            hint = "" if _error(self.args, self.ranks, other, self.quantised) else f"; --experts {other} works"
            raise UserError(f"{error} (it works with {', '.join(map(str, works))}){hint}")

    @classmethod
    def choose(
        cls,
        args: ModelArgs,
        ranks: int,
        asked: AskedLayout = "auto",
        converted: ExpertLayout | None = None,
        quantised: frozenset[str] | bool = False,
        quantised_experts: bool | None = None,
    ) -> "Partition":
        """The partition that `choose_experts` decides on. Raises UserError as both do."""
        experts, reason = choose_experts(args, ranks, asked, converted, quantised_experts)
        return cls(args, ranks, experts, quantised, reason)

    def held_experts(self, rank: int) -> range:
        """The numbers of the routed experts that a rank holds, whole or a slice of each."""
        if self.experts == "split":
            return range(self.args.n_routed_experts)
        each = self.args.n_routed_experts // self.ranks
        return range(rank * each, (rank + 1) * each)

    def cut(self, spec: Spec, rank: int) -> Ranges | None:
        """The part of a tensor that a rank holds; None where it holds nothing of it."""
        if spec.expert is not None and spec.expert not in self.held_experts(rank):
            return None
        split = spec.split if spec.expert is None or self.experts == "split" else None
        parts = [self.ranks if d == split else 1 for d in range(len(spec.shape))]
        return tuple(
            (rank * (n // p), (rank + 1) * (n // p)) if p > 1 else (0, n)
            for n, p in zip(spec.shape, parts, strict=True)
        )


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


def _error(args: ModelArgs, ranks: int, experts: ExpertLayout, quantised: frozenset[str] | bool) -> str | None:
    """Why the model does not divide over the ranks, by its config's names and without the ways out; None if it does."""
    size = sizes(args)
    counts = {"n_heads": args.n_heads, "vocab_size": args.vocab_size}
    if args.n_dense_layers:
        counts["inter_dim"] = args.inter_dim
    if args.n_moe_layers or args.n_mtp_layers:
        if experts == "whole":
            counts["n_routed_experts"] = args.n_routed_experts
        counts["the shared experts' width"] = size["S"]
        if experts == "split":
            counts["moe_inter_dim"] = args.moe_inter_dim
    for name, count in counts.items():
        if count % ranks:
            return f"{args.names.get(name, name)} {count} does not divide by {ranks} ranks"
    if not quantised or ranks == 1:
        return None

    def stays(row: Row) -> bool:
        return row.quantised if quantised is True else row.ours in quantised

    blocks = f"which {ranks} ranks cannot share in whole {_blocks(args)}"
    for row in (*BLOCK, *(DENSE if args.n_dense_layers else ()), *MOE):
        if stays(row) and row.split is not None and _width(row, size) // ranks % args.weight_block[row.split]:
            dimension = ("rows", "columns")[row.split]
            name = (row.hf if args.names else row.ours).removesuffix(".weight")
            return f"{name} has {_width(row, size)} {dimension}, {blocks}"
    if any(map(stays, EXPERT)) and counts.get("moe_inter_dim", 0) // ranks % args.weight_block[1]:
        return f"{args.names.get('moe_inter_dim', 'moe_inter_dim')} is {args.moe_inter_dim}, {blocks}"
    return None


def _width(row: Row, size: dict[str, int]) -> int:
    """Of a tensor, along the dimension that ranks split."""
    assert row.split is not None
    return size[row.shape[row.split]]
