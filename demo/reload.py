"""Reads the demo's checkpoint back into transformers' classes, exactly dequantised; the check of `export.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from export import dequantize


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint in float32, FP8 weights multiplied by their scales."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    raw: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        raw |= load_file(folder / file)
    if set(raw) != set(index):
        raise ValueError("the index and the files name different tensors")
    out = {}
    for name, value in raw.items():
        if not name.endswith("_scale_inv"):
            scale = raw.get(f"{name}_scale_inv")
            out[name] = value.float() if scale is None else dequantize(value, scale)
    return out


def stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with each layer's experts stacked as transformers keeps them."""
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if match:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = value
        else:
            out[name] = value
    for stem, members in experts.items():
        ordered = [members[e] for e in range(len(members))]
        out[f"{stem}.gate_up_proj"] = torch.stack([torch.cat([m["gate"], m["up"]]) for m in ordered])
        out[f"{stem}.down_proj"] = torch.stack([m["down"] for m in ordered])
    return out


def load_transformers(folder: Path, dtype: torch.dtype) -> tuple[DeepseekV3ForCausalLM, MtpModel]:
    """The main model and the MTP module of a checkpoint; the routers' selection biases stay float32."""
    config = DeepseekV3Config.from_pretrained(folder, local_files_only=True)
    main = DeepseekV3ForCausalLM(config)
    mtp = MtpModel(main, 1)
    tensors = stack_experts(read_checkpoint(folder))
    prefix = f"model.layers.{config.num_hidden_layers}."
    module = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    main.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(prefix)})
    for name, own in (("embed_tokens.weight", main.model.embed_tokens), ("shared_head.head.weight", main.lm_head)):
        if not torch.equal(module.pop(name), own.weight):
            raise ValueError(f"{prefix}{name} differs from the main model's")
    outer = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
    renamed = {name if name in outer else f"mtp_block.{name}": value for name, value in module.items()}
    renamed["post_norm.weight"] = renamed.pop("mtp_block.shared_head.norm.weight")
    mtp.layers[0].load_state_dict(renamed)
    for model in (main, mtp):
        biases = {name: value for name, value in model.named_buffers() if name.endswith("e_score_correction_bias")}
        model.to(dtype).eval()
        for name, value in biases.items():
            model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = value.float()
    return main, mtp


@torch.no_grad()
def draft_hits(main: DeepseekV3ForCausalLM, mtp: MtpModel, prompt: list[int], new: list[int]) -> tuple[int, int]:
    """How many of the tokens `new` (but the first) the MTP module would have drafted right, and how many it would
    have been asked for: from each position its greedy guess of the token after the next."""
    if len(new) < 2:
        return 0, 0
    tokens = torch.tensor([prompt + new])
    positions = torch.arange(tokens.shape[1])[None]
    embedded = main.model.embed_tokens(tokens)
    hidden = main.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    drafted = mtp.forward_layer(0, hidden[:, :-1], positions[:, :-1], None, input_ids=tokens[:, 1:])
    guesses = main.lm_head(drafted)[0, len(prompt) - 1 : -1].argmax(-1)
    return int((guesses == tokens[0, len(prompt) + 1 :]).sum()), len(new) - 1
