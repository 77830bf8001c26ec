"""The table of tensors: their names, shapes and dtypes in a checkpoint of any model of the family.

"Our" names are those in memory and in converted files: the original repository's, with the MTP module added.
A `scale` is Hugging Face's `weight_scale_inv`: one per 128x128 block, weight = FP8 value * scale.

A row allows several dtypes, as files in circulation have them. Which one a checkpoint uses is read from its headers,
tensor by tensor (`Checkpoint.expected`), and decides in what form a weight lies in memory (`exceptions`).
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from core.config import ModelArgs
from core.numerics import FLOAT32, Form, Numerics
from core.numerics import PLAIN as PLAIN_FORM

FP8 = torch.float8_e4m3fn
PLAIN = (torch.bfloat16, torch.float32, torch.float16)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
# buffers of the rotary embedding that some programs saved; they follow from the config
IGNORED = tuple(f"rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached"))


class Row(NamedTuple):
    """A tensor's two names, its shape in symbols of `sizes`, and the dimension that ranks split (None: all have it).

    Routed experts are split only in the "split" layout; in the "whole" layout a rank holds some of them uncut. A row
    does not exist where a size in its shape is 0.
    """

    ours: str
    hf: str
    shape: tuple[str, ...]
    split: int | None = None
    quantised: bool = False  # in a quantised checkpoint, unless that stores it plain
    required: bool = True
    exact: bool = False  # in memory it loses nothing of what is stored; so does everything of one dimension

    @property
    def inner(self) -> bool:
        """The dimension that ranks split is an MLP's inner width."""
        return self.split is not None and self.shape[self.split] in ("I", "S", "M")


TOP = (
    Row("embed.weight", "model.embed_tokens.weight", ("V", "H"), 0),
    Row("norm.weight", "model.norm.weight", ("H",)),
    Row("head.weight", "lm_head.weight", ("V", "H"), 0, exact=True),
)
BLOCK = (
    Row("attn_norm.weight", "input_layernorm.weight", ("H",)),
    Row("attn.wq.weight", "self_attn.q_proj.weight", ("N(dn+R) direct", "H"), 0, True),
    Row("attn.wq_a.weight", "self_attn.q_a_proj.weight", ("Q", "H"), None, True),
    Row("attn.q_norm.weight", "self_attn.q_a_layernorm.weight", ("Q",)),
    Row("attn.wq_b.weight", "self_attn.q_b_proj.weight", ("N(dn+R)", "Q"), 0, True),
    Row("attn.wkv_a.weight", "self_attn.kv_a_proj_with_mqa.weight", ("C+R", "H"), None, True),
    Row("attn.kv_norm.weight", "self_attn.kv_a_layernorm.weight", ("C",)),
    Row("attn.wkv_b.weight", "self_attn.kv_b_proj.weight", ("N(dn+dv)", "C"), 0, True),
    Row("attn.wo.weight", "self_attn.o_proj.weight", ("H", "N dv"), 1, True),
    Row("ffn_norm.weight", "post_attention_layernorm.weight", ("H",)),
)
DENSE = (
    Row("ffn.w1.weight", "mlp.gate_proj.weight", ("I", "H"), 0, True),
    Row("ffn.w2.weight", "mlp.down_proj.weight", ("H", "I"), 1, True),
    Row("ffn.w3.weight", "mlp.up_proj.weight", ("I", "H"), 0, True),
)
MOE = (
    Row("ffn.gate.weight", "mlp.gate.weight", ("E", "H"), exact=True),
    Row("ffn.gate.bias", "mlp.gate.e_score_correction_bias", ("E biased",)),
    Row("ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight", ("S", "H"), 0, True),
    Row("ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight", ("H", "S"), 1, True),
    Row("ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight", ("S", "H"), 0, True),
)
EXPERT = (
    Row("w1.weight", "gate_proj.weight", ("M", "H"), 0, True),
    Row("w2.weight", "down_proj.weight", ("H", "M"), 1, True),
    Row("w3.weight", "up_proj.weight", ("M", "H"), 0, True),
)
MTP = (  # besides an ordinary layer's tensors; the released files repeat the main model's embedding and head
    Row("embed.weight", "embed_tokens.weight", ("V", "H"), 0, required=False),
    Row("enorm.weight", "enorm.weight", ("H",)),
    Row("hnorm.weight", "hnorm.weight", ("H",)),
    Row("eh_proj.weight", "eh_proj.weight", ("H", "2H")),
    Row("norm.weight", "shared_head.norm.weight", ("H",)),
    Row("head.weight", "shared_head.head.weight", ("V", "H"), 0, required=False),
)


def sizes(args: ModelArgs) -> dict[str, int]:
    """The number that each symbol in the table's shapes stands for in this model."""
    queries = args.n_heads * args.qk_head_dim
    return {
        "V": args.vocab_size, "H": args.dim, "2H": 2 * args.dim, "Q": args.q_lora_rank, "C": args.kv_lora_rank,
        "N(dn+R)": queries, "N(dn+R) direct": 0 if args.q_lora_rank else queries, "C+R": args.latent_dim,
        "N(dn+dv)": args.n_heads * (args.qk_nope_head_dim + args.v_head_dim), "N dv": args.n_heads * args.v_head_dim,
        "I": args.inter_dim, "M": args.moe_inter_dim, "S": args.n_shared_experts * args.moe_inter_dim,
        "E": args.n_routed_experts, "E biased": args.n_routed_experts if args.gate_bias else 0,
    }  # fmt: skip


class Spec(NamedTuple):
    """What the table says of one tensor of one model, whole."""

    shape: tuple[int, ...]  # in which it is stored
    dtype: torch.dtype  # in which it is stored
    hf: str  # its name in a Hugging Face checkpoint
    split: int | None  # the dimension that ranks split
    expert: int | None  # the number of the routed expert that it belongs to
    required: bool  # False: a checkpoint may lack it
    allowed: tuple[torch.dtype, ...]  # in which it may be stored
    exact: bool  # see Row
    form: Form | None = None  # of a projection's weight: how it is stored
    inner: bool = False  # see Row: all lanes' ranks split it; what else is split, one lane's ranks split


Stored = frozenset[tuple[str, torch.dtype]]  # tensors, by our names, and dtypes


@functools.lru_cache(maxsize=4)
def expected_tensors(
    args: ModelArgs, quantised: bool, mtp: bool = True, stored: Stored = frozenset()
) -> dict[str, Spec]:
    """Every tensor of a checkpoint by our name. `quantised`: linear layers are, and have scales; of INT4 and INT8 in
    groups those of the routed experts. `mtp` False leaves the MTP module out. `stored`: the tensors that are stored in
    another dtype than is usual then."""
    size, unusual = sizes(args), dict(stored)
    plain = {"fp32": torch.float32, "fp16": torch.float16}.get(args.dtype, torch.bfloat16)
    usual_form = quantised_form(args)
    found: dict[str, Spec] = {}

    def add(row: Row, ours: str = "", hf: str = "", expert: int | None = None) -> None:
        shape = tuple(size[word] for word in row.shape)
        if 0 in shape:
            return
        name, theirs = ours + row.ours, hf + row.hf
        tied = args.tie_word_embeddings and row in TOP
        required = row.required and not (row.hf == "lm_head.weight" and tied)
        exact = row.exact or len(shape) == 1 or tied
        usual = torch.float32 if name.endswith(".bias") else plain
        if row.quantised and quantised and (expert is not None or not args.group_size):
            usual = usual_form.dtype
        dtype = unusual.get(name, usual)
        if not row.quantised:
            found[name] = Spec(shape, dtype, theirs, row.split, expert, required, PLAIN, exact, None, row.inner)
            return
        form = None
        if dtype == usual_form.dtype:
            form = usual_form._replace(scale=held_scale(unusual.get(scale_name(name)), usual_form))
            shape = *shape[:-1], shape[-1] // form.packing
        allowed = (*PLAIN, usual_form.dtype)
        in_memory = form or PLAIN_FORM
        found[name] = Spec(shape, dtype, theirs, row.split, expert, required, allowed, exact, in_memory, row.inner)
        if form is not None:
            for part, spec in block_specs(found[name]).items():
                part = name.removesuffix("weight") + part
                found[part] = spec._replace(dtype=unusual.get(part, spec.dtype))

    for row in TOP:
        add(row)
    for i in range(args.n_layers + (args.n_mtp_layers if mtp else 0)):
        k = i - args.n_layers
        ours, hf = (f"layers.{i}." if k < 0 else f"mtp.{k}."), f"model.layers.{i}."
        dense = i < args.n_dense_layers
        for row in (*BLOCK, *(DENSE if dense else MOE), *(MTP if k >= 0 else ())):
            add(row, ours, hf)
        for e in range(0 if dense else args.n_routed_experts):
            for row in EXPERT:
                add(row, f"{ours}ffn.experts.{e}.", f"{hf}mlp.experts.{e}.", e)
    return found


def quantised_form(args: ModelArgs) -> Form:
    """The form of the weights that a checkpoint has quantised, if it has some."""
    kind: Any = args.dtype if args.dtype in ("int8", "int4") else "fp8"
    return Form(kind, args.weight_block, zeros=args.zero_points)


def held_scale(stored: torch.dtype | None, form: Form) -> torch.dtype:
    """The dtype in memory of scales that are stored so (None: as usual). One of 128x128 weights is small; one of 32 is
    not, and stays as it is."""
    if form.block[0] > 1:
        return torch.float32
    return torch.bfloat16 if stored is None else stored if stored in PLAIN else torch.float32


def block_specs(weight: Spec) -> dict[str, Spec]:
    """The tensors beside a quantised weight, by the last word of our names: its scales and, of INT4 that has them, its
    zero points, one each for every block of rows and columns."""
    form = weight.form
    assert form is not None and form.is_quantised
    values = weight.shape[0], weight.shape[1] * form.packing
    blocks = tuple(math.ceil(n / b) for n, b in zip(values, form.block, strict=True))
    beside = weight._replace(shape=blocks, exact=True, form=None)
    found = {"scale": beside._replace(dtype=form.scale, hf=weight.hf + "_scale_inv", allowed=SCALES)}
    if form.zeros:
        found["zero"] = beside._replace(dtype=torch.uint8, hf=weight.hf + "_zero_point", allowed=(torch.uint8,))
    return found


def scale_name(weight: str) -> str:
    return weight.removesuffix("weight") + "scale"


def zero_name(weight: str) -> str:
    return weight.removesuffix("weight") + "zero"


# --------------------------------------------------------------------------------------------------------------------
# From what is stored to what lies in memory
# --------------------------------------------------------------------------------------------------------------------

STACKED = {"w1": "w13", "w3": "w13", "wq": "wqkv_a", "wq_a": "wqkv_a", "wkv_a": "wqkv_a"}  # see model.Linear


def module_of(name: str) -> str:
    """The module of model.py that holds a tensor; of routed experts all those of a layer."""
    before, routed, _ = name.partition(".experts.")
    if routed:
        return f"{before}.experts"
    *path, module, _ = name.split(".")
    return ".".join((*path, STACKED.get(module, module)))


def stored_dtype(specs: Mapping[str, Spec]) -> Literal["fp8", "int8", "int4", "bf16", "fp32", "fp16"]:
    """ModelArgs.dtype of a checkpoint that stores its tensors so: that of quantised weights if there are any, else the
    widest of the weights that are multiplied in the activations' dtype. Norms, routers, embedding and head have no say:
    in any run they lose nothing that shows."""
    for spec in specs.values():
        if spec.form is not None and spec.form.is_quantised:
            return spec.form.kind  # type: ignore[return-value]  # which are three of these
    dtypes = {spec.dtype for name, spec in specs.items() if is_rounded(name, spec)}
    return "fp32" if torch.float32 in dtypes else "fp16" if torch.float16 in dtypes else "bf16"


def is_rounded(name: str, spec: Spec) -> bool:
    """Whether a run in a narrower dtype than a weight's own computes something else. Rounding an embedding's row when
    it is looked up, as that run would, is no other than rounding it before."""
    return not spec.exact and not name.endswith("embed.weight")


def exceptions(specs: Mapping[str, Spec], num: Numerics) -> tuple[tuple[str, Form], ...]:
    """Numerics.exceptions of a checkpoint that stores its tensors so, in a run with these numerics.

    A stack is quantised only if all its parts are stored in one form. If some are in another, it is dequantised, each
    product rounded once: one of the forms must give way, and this one loses less. w13 and w2 of routed experts count as
    one stack, as kernels choose their tiles for both.
    """
    projections: dict[str, Form] = {}
    found: dict[str, Form] = {}
    for name, spec in specs.items():
        if spec.form is not None:
            module = module_of(name)
            alike = projections.setdefault(module, spec.form) == spec.form
            projections[module] = spec.form if alike else PLAIN_FORM
        elif num.dtype == torch.bfloat16 and spec.dtype != torch.bfloat16 and spec.exact:
            if name.endswith("ffn.gate.weight"):
                found[module_of(name)] = FLOAT32
            elif name in ("head.weight", "embed.weight"):
                found["head"] = FLOAT32
    if num.gemm is not None:
        found |= {module: form for module, form in projections.items() if form != num.projections}
    return tuple(sorted(found.items()))


def quantised_rows(specs: Mapping[str, Spec], num: Numerics | None = None) -> frozenset[str]:
    """The rows of which some tensor is quantised, by our names without the layer's or the expert's: in the files, or
    with `num` in memory."""
    if num is not None and num.gemm is None:
        return frozenset()
    others = {} if num is None else dict(num.exceptions)

    def is_quantised(name: str, spec: Spec) -> bool:
        if num is None or spec.form is None:
            return spec.form is not None and spec.form.is_quantised
        return others.get(module_of(name), num.projections).is_quantised

    found = (name for name, spec in specs.items() if is_quantised(name, spec))
    return frozenset(name.split(".", 5 if ".experts." in name else 2)[-1] for name in found)


def has_experts(rows: frozenset[str]) -> bool:
    """Whether these rows, as quantised_rows names them, have some of the routed experts'."""
    return not rows.isdisjoint(row.ours for row in EXPERT)
