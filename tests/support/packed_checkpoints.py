"""Random checkpoints in the quantised layouts of other programs, and the plain weights that they mean.

Written from the formats' public descriptions, value by value, not from checkpoint/packed.py.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import _tensors, make_checkpoint


class Layout(NamedTuple):
    """A layout and what it is made with."""

    method: str
    bits: int = 4
    group: int = 0  # 0: blocks of 128 by 128
    zeros: bool = False
    scale: torch.dtype = torch.bfloat16
    fmt: str = ""

    @property
    def experts_only(self) -> bool:
        return self.method == "compressed-tensors"


LAYOUTS = {
    "int4-groups-of-32": Layout("compressed-tensors", 4, 32),
    "int4-groups-of-128": Layout("compressed-tensors", 4, 128, scale=torch.float32),
    "int4-zero-points": Layout("compressed-tensors", 4, 32, zeros=True),
    "int8-groups-of-128": Layout("compressed-tensors", 8, 128),
    "int8-blocks": Layout("blockwise_int8", 8, scale=torch.float32),
    "awq": Layout("awq", 4, 32, True, torch.float16),
    "gptq": Layout("gptq", 4, 32, True, torch.float16, "gptq"),
    "gptq_v2": Layout("gptq", 4, 32, True, torch.float16, "gptq_v2"),
}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight columns lies at each place of an int32, as AutoAWQ packs them


def make_packed(folder: Path, layout: Layout, config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Writes a checkpoint, and returns every tensor by its released name, quantised ones as what they mean: float32
    (N, K)."""
    make_checkpoint(folder, config, seed=seed, shard_bytes=1 << 30)
    (file,) = folder.glob("*.safetensors")
    held, made = load_file(file), torch.Generator().manual_seed(seed + 1)
    plain = dict(held)
    for name, _, quantised in _tensors(config):
        if quantised and (".experts." in name or not layout.experts_only):
            tensors, plain[name] = _random(held.pop(name).shape, layout, made)
            held |= {name.removesuffix(".weight") + ending: tensor for ending, tensor in tensors.items()}
    save_file({name: t.contiguous() for name, t in held.items()}, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(held, file.name)}))
    written = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization_config(layout)}
    (folder / "config.json").write_text(json.dumps(written))
    return plain


def quantization_config(layout: Layout) -> dict[str, Any]:
    if layout.method == "blockwise_int8":
        return {"quant_method": "blockwise_int8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    if layout.method == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": layout.group, "zero_point": True, "version": "gemm"}
    if layout.method == "gptq":
        return {"quant_method": "gptq", "bits": 4, "group_size": layout.group, "desc_act": False, "sym": False,
                "checkpoint_format": layout.fmt}  # fmt: skip
    weights = {"num_bits": layout.bits, "type": "int", "strategy": "group", "group_size": layout.group,
               "symmetric": not layout.zeros, "dynamic": False, "actorder": None, "observer": "minmax"}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "kv_cache_scheme": None, "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
            "config_groups": {"group_0": group}}  # fmt: skip


def _random(
    shape: torch.Size, layout: Layout, made: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight (N, K): its tensors by the ends of their names, and what it means."""
    n, k = shape
    levels = 1 << layout.bits
    q = torch.randint(levels, (n, k), generator=made)  # as it is stored, from 0 on
    rows, columns = (128, 128) if layout.group == 0 else (1, layout.group)
    blocks = -(-n // rows), -(-k // columns)
    scale = ((torch.rand(blocks, generator=made) + 0.5) / levels / k**0.5 * 4).to(layout.scale)
    zero = torch.full(blocks, levels // 2)
    if layout.zeros:
        zero = torch.randint(levels, blocks, generator=made)
    down, across = torch.arange(n) // rows, torch.arange(k) // columns
    means = ((q - zero[down][:, across]).double() * scale.double()[down][:, across]).float()
    if layout.method == "blockwise_int8":
        return {".weight": (q - 128).to(torch.int8), ".weight_scale_inv": scale}, means
    if layout.method == "compressed-tensors":
        per = 32 // layout.bits
        tensors = {".weight_packed": _words(q, range(per), layout.bits), ".weight_scale": scale,
                   ".weight_shape": torch.tensor([n, k])}  # fmt: skip
        if layout.zeros:
            padded = torch.cat((zero, torch.zeros(-n % 8, blocks[1], dtype=zero.dtype)))
            tensors[".weight_zero_point"] = _words(padded.T, range(8), 4).T
        return tensors, means
    order = AWQ_ORDER if layout.method == "awq" else range(8)
    stored = (zero - int(layout.fmt == "gptq")) % 16
    tensors = {".scales": scale.T, ".qzeros": _words(stored.T, order, 4)}
    if layout.method == "awq":
        return tensors | {".qweight": _words(q.T, order, 4)}, means
    group_of = torch.arange(k, dtype=torch.int32) // columns
    return tensors | {".qweight": _words(q, order, 4).T, ".g_idx": group_of.to(torch.int32)}, means


def _words(values: torch.Tensor, order: Any, bits: int) -> torch.Tensor:
    """(A, B) to int32 (A, B / per): of `per` neighbours, the one that `order` names first lies in the lowest bits."""
    per = 32 // bits
    found = torch.zeros(values.shape[0], values.shape[1] // per, dtype=torch.int64)
    for place, which in enumerate(order):
        found |= values[:, which::per].long() << (bits * place)
    return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)
