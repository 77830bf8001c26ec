"""The named points of a forward: what a trace holds, by the V3 report's names and equations (arXiv 2412.19437).

A point's full name has its layer before it: `layers.3.attn.c_kv`, `mtp.0.ffn.out`. A layer's points are in the order in
which they are computed, and each can be recomputed from points before it (`inputs`) and the weights.

Letters of shapes: T tokens, H hidden size, N heads, Q q_lora_rank, C kv_lora_rank, R qk_rope_head_dim, dn and dv the
heads' other dimensions, E experts, K experts per token, V vocabulary.
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from core.config import ModelArgs

Combine = Literal["same", "heads", "sum"]  # what ranks hold of a point: all of it, some heads, or a partial sum
LAYER = re.compile(r"(layers\.\d+|mtp\.\d+)\.(.+)")


class Point(NamedTuple):
    """One kind of value. `inputs` are points of the same layer; "before" is the layer's input, `tokens` the ids."""

    name: str  # within its layer
    shape: tuple[str, ...]  # of one token
    title: str  # what the report calls it
    equation: str  # its number in the report; empty: it has none
    inputs: tuple[str, ...]
    combine: Combine = "same"
    exact: Literal["", "float32", "int64"] = ""  # its dtype, if that is not the activations'


LAYER_POINTS = (
    Point("attn_norm", ("H",), "RMSNorm before attention", "", ("before",)),
    Point("attn.q_a", ("Q",), "W^DQ h, before its norm", "6", ("attn_norm",)),
    Point("attn.c_q", ("Q",), "queries' latent c^Q, after its norm", "6", ("attn.q_a",)),
    Point("attn.q_nope", ("N", "dn"), "queries q^C", "7", ("attn.c_q", "attn_norm"), "heads"),
    Point("attn.q_rope", ("N", "R"), "rotated queries q^R", "8", ("attn.c_q", "attn_norm"), "heads"),
    Point("attn.kv_a", ("C+R",), "W^DKV h and W^KR h, before norm and RoPE", "1, 3", ("attn_norm",)),
    Point("attn.c_kv", ("C",), "keys' and values' latent c^KV, after its norm", "1", ("attn.kv_a",)),
    Point("attn.k_rope", ("R",), "rotated key k^R", "3", ("attn.kv_a",)),
    Point("attn.o", ("N", "dv"), "heads' outputs o", "10, with 2, 4, 5 and 9",
          ("attn.q_nope", "attn.q_rope", "attn.c_kv", "attn.k_rope"), "heads"),
    Point("attn.out", ("H",), "attention's output u", "11", ("attn.o",)),
    Point("after_attn", ("H",), "residual after attention", "", ("before", "attn.out")),
    Point("ffn_norm", ("H",), "RMSNorm before the feed-forward layer", "", ("after_attn",)),
    Point("ffn.router_logits", ("E",), "affinities u e_i before their function", "15", ("ffn_norm",), exact="float32"),
    Point("ffn.ids", ("K",), "chosen experts", "14, 16", ("ffn.router_logits",), exact="int64"),
    Point("ffn.weights", ("K",), "gating values g", "13", ("ffn.router_logits", "ffn.ids"), exact="float32"),
    Point("ffn.routed", ("H",), "routed experts' sum", "12", ("ffn_norm", "ffn.ids", "ffn.weights"), "sum"),
    Point("ffn.shared", ("H",), "shared experts' sum", "12", ("ffn_norm",), "sum"),
    Point("ffn.out", ("H",), "feed-forward layer's output", "12", ("ffn.routed", "ffn.shared", "ffn_norm")),
    Point("hidden", ("H",), "residual after the layer", "12", ("after_attn", "ffn.out")),
)  # fmt: skip
MTP_POINTS = (
    Point("embed", ("H",), "embedding of the token after", "21", ("tokens",)),
    Point("enorm", ("H",), "RMSNorm of that embedding", "21", ("embed",)),
    Point("hnorm", ("H",), "RMSNorm of the hidden state", "21", ("previous",)),
    Point("combined", ("H",), "M_k of both", "21", ("enorm", "hnorm")),
)
HEAD_POINTS = (
    Point("norm", ("H",), "final RMSNorm", "", ("hidden",)),
    Point("logits", ("V",), "logits", "", ("norm",), exact="float32"),
)
EMBED = Point("embed", ("H",), "token embedding", "", ("tokens",))
MTP_HEAD_POINTS = (
    HEAD_POINTS[0]._replace(title="shared head's RMSNorm", equation="23"),
    HEAD_POINTS[1]._replace(title="drafts' logits", equation="23"),
)
POINTS = (EMBED, *LAYER_POINTS, *HEAD_POINTS, *MTP_POINTS)
MOE_ONLY = ("ffn.router_logits", "ffn.ids", "ffn.weights", "ffn.routed", "ffn.shared")


def names_of(args: ModelArgs, mtp: bool | None = None) -> dict[str, Point]:
    """Every point of a model by its full name, in the order of execution. mtp: with the MTP module's (None: if args has
    one)."""
    found = {"embed": EMBED}
    for i in range(args.n_layers):
        found |= _layer(args, f"layers.{i}", i < args.n_dense_layers)
    found |= {point.name: point for point in HEAD_POINTS}
    for k in range(args.n_mtp_layers if mtp is None else int(mtp)):
        at = f"mtp.{k}"
        found |= {f"{at}.{point.name}": point for point in MTP_POINTS}
        found |= _layer(args, at, False)
        found |= {f"{at}.{point.name}": point for point in MTP_HEAD_POINTS}
    return found


def _layer(args: ModelArgs, at: str, dense: bool) -> dict[str, Point]:
    def exists(point: Point) -> bool:
        if point.name in MOE_ONLY and (dense or (point.name == "ffn.shared" and not args.n_shared_experts)):
            return False
        return "Q" not in point.shape or args.q_lora_rank > 0

    return {f"{at}.{point.name}": point for point in LAYER_POINTS if exists(point)}


def split_name(name: str) -> tuple[str, str]:
    """A full name's layer ("layers.3", "mtp.0", or "" for the model's own points) and its point."""
    found = LAYER.fullmatch(name)
    return (found[1], found[2]) if found else ("", name)


def sizes(args: ModelArgs) -> dict[str, int]:
    """The number that each letter of a point's shape stands for."""
    return {
        "H": args.dim, "N": args.n_heads, "Q": args.q_lora_rank, "C": args.kv_lora_rank, "R": args.qk_rope_head_dim,
        "C+R": args.latent_dim, "dn": args.qk_nope_head_dim, "dv": args.v_head_dim, "E": args.n_routed_experts,
        "K": args.n_activated_experts, "V": args.vocab_size,
    }  # fmt: skip


def shape_of(point: Point, args: ModelArgs) -> tuple[int, ...]:
    """Of one token."""
    size = sizes(args)
    return tuple(size[letter] for letter in point.shape)


def describe(name: str) -> str:
    """A point for people: `layer 3, queries' latent c^Q, after its norm (equation 6)`."""
    layer, rest = split_name(name)
    table = MTP_POINTS + LAYER_POINTS + MTP_HEAD_POINTS if layer.startswith("mtp") else POINTS
    point = next((point for point in table if point.name == rest), None)
    where = layer.replace("layers.", "layer ").replace("mtp.", "MTP module ")
    if point is None:
        return name
    equation = f" (equation {point.equation})" if point.equation else ""
    return ", ".join(filter(None, (where, point.title))) + equation


def markdown() -> Iterator[str]:
    """The table of points, a line at a time, for documents."""
    yield "| point | shape | what | equation |"
    yield "|---|---|---|---|"
    rows = [("", EMBED), *(("L.", point) for point in LAYER_POINTS), *(("", point) for point in HEAD_POINTS),
            *(("mtp.k.", point) for point in (*MTP_POINTS, *MTP_HEAD_POINTS))]  # fmt: skip
    for before, point in rows:
        yield f"| `{before}{point.name}` | {', '.join(('T', *point.shape))} | {point.title} | {point.equation} |"
