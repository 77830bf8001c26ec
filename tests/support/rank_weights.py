"""What a rank's weights must be, worked out from a Hugging Face directory by other code than checkpoint/ has."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.directory import Checkpoint
from checkpoint.load import load_into
from checkpoint.table import exceptions
from core.config import ModelArgs
from core.errors import UserError
from core.numerics import Numerics
from model import Transformer
from parallel.group import SOLO, Group
from support.checkpoints import dequantise, fp8_sizes, make_checkpoint
from support.damaged_checkpoints import drop, edit, files, header_of, whole
from support.families import FAMILIES

FP8 = Numerics(torch.bfloat16, gemm="fp8")
CONFIG = FAMILIES["v3"] | fp8_sizes(8) | {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_hidden_layers": 2}
# the experts' width divides over eight ranks too
WIDE = CONFIG | {"moe_intermediate_size": 1024, "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 4}


def upstream_name(hf: str) -> str:
    """The original repository's name of a tensor of the main model, by that repository's rules."""
    for old, new in (
        ("model.", ""), ("self_attn", "attn"), ("mlp", "ffn"), ("weight_scale_inv", "scale"),
        ("e_score_correction_bias", "bias"), ("embed_tokens", "embed"), ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("q_a_layernorm", "q_norm"), ("kv_a_layernorm", "kv_norm"),
        ("kv_a_proj_with_mqa", "wkv_a"), ("q_a_proj", "wq_a"), ("q_b_proj", "wq_b"), ("kv_b_proj", "wkv_b"),
        ("q_proj", "wq"), ("o_proj", "wo"), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"),
        ("lm_head", "head"),
    ):  # fmt: skip
        hf = hf.replace(old, new)
    return hf


def our_name(hf: str, n_layers: int) -> str:
    """As upstream's, with the MTP module in the place of layer n_layers."""
    hf = hf.replace(f"model.layers.{n_layers}.", "mtp.0.").replace("shared_head.", "")
    return upstream_name(hf)


def part(
    name: str, tensor: torch.Tensor, rank: int, ranks: int, n_experts: int, experts: str = "whole"
) -> torch.Tensor | None:
    """A rank's share of a tensor, by upstream's name: rows, columns, whole experts, or all of it."""
    layer = name.split(".")
    if ".experts." in name and experts == "whole":
        each = n_experts // ranks
        return tensor if int(layer[layer.index("experts") + 1]) // each == rank else None
    kind = layer[-2]
    if kind in ("embed", "head", "wq", "wq_b", "wkv_b", "w1", "w3"):
        return tensor.chunk(ranks, dim=0)[rank]
    if kind in ("wo", "w2"):
        return tensor.chunk(ranks, dim=1)[rank]
    return tensor


def in_memory(
    source: Path | dict[str, torch.Tensor], rank: int, ranks: int, config: dict, experts: str = "whole"
) -> dict[str, torch.Tensor]:
    """What a rank's parameters must be, from a Hugging Face directory or its tensors: experts stacked, and projections
    of one input one below the other."""
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for hf, tensor in (whole(source) if isinstance(source, Path) else source).items():
        name = our_name(hf, config["num_hidden_layers"])
        if (mine := part(name, tensor, rank, ranks, config["n_routed_experts"], experts)) is None:
            continue
        mine = mine.float() if mine.dim() == 1 or name.endswith("scale") else mine
        before, expert, after = name.partition(".experts.")
        if expert:
            number, _, rest = after.partition(".")
            stacks.setdefault(f"{before}.experts.{rest}", {})[int(number)] = mine
        elif name not in ("mtp.0.embed.weight", "mtp.0.head.weight"):  # the model shares the main ones
            found[name] = mine
    found |= {name: torch.stack([stack[e] for e in sorted(stack)]) for name, stack in stacks.items()}
    for name in list(found):
        for first, second, together in (("w1", "w3", "w13"), ("wq", "wkv_a", "wqkv_a"), ("wq_a", "wkv_a", "wqkv_a")):
            before, at, leaf = name.partition(f".{first}.")
            if at:
                pair = found.pop(name), found.pop(f"{before}.{second}.{leaf}")
                found[f"{before}.{together}.{leaf}"] = one_below_the_other(*pair)
    return found


def one_below_the_other(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two projections (…, rows, in) as one: FP8 ones begin at whole blocks, with zeros between, and if they are of one
    width the second ends where its last block does."""
    if a.dtype == torch.float8_e4m3fn:
        last = -b.shape[-2] % 128 if a.shape == b.shape else 0
        a, b = (t.view(torch.uint8) for t in (a, b))
        a, b = torch.nn.functional.pad(a, (0, 0, 0, -a.shape[-2] % 128)), torch.nn.functional.pad(b, (0, 0, 0, last))
        return torch.cat((a, b), dim=-2).view(torch.float8_e4m3fn)
    return torch.cat((a, b), dim=-2)


def write_upstream(folder: Path, target: Path, ranks: int, config: dict) -> None:
    """A directory as the original repository's converter leaves it: rank files, no metadata, no MTP, no config."""
    target.mkdir()
    for rank in range(ranks):
        mine = {}
        for hf, tensor in whole(folder).items():
            if f".layers.{config['num_hidden_layers']}." not in hf:
                name = upstream_name(hf)
                share = part(name, tensor, rank, ranks, config["n_routed_experts"])
                mine |= {} if share is None else {name: share.contiguous()}
        save_file(mine, target / f"model{rank}-mp{ranks}.safetensors")


def build(checkpoint: Checkpoint, num: Numerics, group: Group = SOLO, args: ModelArgs | None = None) -> Transformer:
    """A model whose every value is wrong until it is loaded. Files made for ranks decide how the experts lie."""
    args = args or checkpoint.args
    num = dataclasses.replace(num, experts=checkpoint.experts(group.size) or num.experts)
    num = dataclasses.replace(num, exceptions=exceptions(checkpoint.expected(args), num))
    model = Transformer(args, num, group, mtp=bool(args.n_mtp_layers) and checkpoint.has_mtp)
    for p in model.parameters():
        p.data.view(torch.uint8).fill_(0x55)
    return model


def loaded(folder: Path, num: Numerics, group: Group = SOLO, args: ModelArgs | None = None) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    model = build(checkpoint, num, group, args)
    load_into(model, checkpoint, progress=False)
    return dict(model.named_parameters())


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and tensor.shape == wanted[name].shape, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), wanted[name].contiguous().view(torch.uint8)), name


def refusal(folder: Path, num: Numerics = FP8, group: Group = SOLO) -> str:
    """What loading the directory says; the directory's own path is cut from it."""
    with pytest.raises(UserError) as e:
        loaded(folder, num, group)
    assert "\n" not in str(e.value)
    return str(e.value).replace(f"{folder}/", "").replace(str(folder), "DIR")


def multiplied_out(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, fp8: bool = False, cast: bool = False
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with FP8 weights times their scales, rounded once, unless they stay `fp8`, and the others
    in dtype. Norms, routers with their biases and the head are only ever widened. With `cast` what is not FP8 stays."""
    found = {}
    for name, tensor in tensors.items():
        scale = name.endswith("_scale_inv")
        if tensor.dtype == torch.float8_e4m3fn and not fp8:
            found[name] = dequantise(tensor, tensors[name + "_scale_inv"].float()).to(dtype)
        elif tensor.dtype == torch.float8_e4m3fn or (cast and not scale) or (fp8 and scale):
            found[name] = tensor
        elif not scale:
            exact = tensor.dim() == 1 or name.endswith((".mlp.gate.weight", "lm_head.weight"))
            keeps = exact and tensor.dtype != torch.bfloat16
            found[name] = tensor.float() if keeps else tensor.to(dtype)
    return found


def unquantise(folder: Path, where: Callable[[str], bool], dtype: torch.dtype = torch.bfloat16) -> None:
    """Stores weights plain, and takes their scales away."""
    tensors = whole(folder)
    plain = {n: dequantise(t, tensors[n + "_scale_inv"].float()).to(dtype) for n, t in tensors.items()
             if t.dtype == torch.float8_e4m3fn and where(n)}  # fmt: skip
    assert plain
    for file in files(folder):
        if header_of(file)[0].keys() & plain.keys():
            edit(file, lambda held: held.update({n: plain[n] for n in held if n in plain}))
    drop(folder, lambda n: n.removesuffix("_scale_inv") in plain and n not in plain)


def fp8_checkpoint(folder: Path) -> Path:
    """An FP8 checkpoint in several shards that divides over eight ranks. Tests copy it before they damage it."""
    make_checkpoint(folder, CONFIG, fp8=True, shard_bytes=2 << 20)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder
