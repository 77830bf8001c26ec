"""The table of tensors: their names, shapes and dtypes in a checkpoint of any model of the family.

"Our" names are those in memory and in converted files: the original repository's, with the MTP module added.
A `scale` is Hugging Face's `weight_scale_inv`: float32, one per 128x128 block, weight = FP8 value * scale.
"""

import functools
import math
from typing import NamedTuple

import torch

from core.config import BLOCK_SIZE, ModelArgs

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
    fp8: bool = False  # in an FP8 checkpoint
    required: bool = True


TOP = (
    Row("embed.weight", "model.embed_tokens.weight", ("V", "H"), 0),
    Row("norm.weight", "model.norm.weight", ("H",)),
    Row("head.weight", "lm_head.weight", ("V", "H"), 0),
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
    Row("ffn.gate.weight", "mlp.gate.weight", ("E", "H")),
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

    shape: tuple[int, ...]
    dtype: torch.dtype
    hf: str  # its name in a Hugging Face checkpoint
    split: int | None  # the dimension that ranks split
    expert: int | None  # the number of the routed expert that it belongs to
    required: bool  # False: a checkpoint may lack it


@functools.lru_cache(maxsize=2)
def expected_tensors(args: ModelArgs, quantised: bool, mtp: bool = True) -> dict[str, Spec]:
    """Every tensor of a checkpoint by our name. `quantised`: linear layers are FP8 and have scales. `mtp` False leaves
    the MTP module out."""
    size = sizes(args)
    plain = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    found: dict[str, Spec] = {}

    def add(row: Row, ours: str = "", hf: str = "", expert: int | None = None) -> None:
        shape = tuple(size[word] for word in row.shape)
        if 0 in shape:
            return
        name, theirs = ours + row.ours, hf + row.hf
        required = row.required and not (row.hf == "lm_head.weight" and args.tie_word_embeddings)
        fp8 = row.fp8 and quantised
        dtype = torch.float8_e4m3fn if fp8 else torch.float32 if name.endswith(".bias") else plain
        found[name] = Spec(shape, dtype, theirs, row.split, expert, required)
        if fp8:
            blocks = tuple(math.ceil(n / BLOCK_SIZE) for n in shape)
            found[scale_name(name)] = Spec(blocks, torch.float32, theirs + "_scale_inv", row.split, expert, required)

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


def scale_name(weight: str) -> str:
    return weight.removesuffix("weight") + "scale"
