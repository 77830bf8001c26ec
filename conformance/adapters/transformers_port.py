"""transformers' own classes behind the conformance suite's protocol, with hooks for some of the named activations.

python conformance/check_port.py --command "python conformance/adapters/transformers_port.py"
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_ONLY = ("model_type", "torch_dtype", "quantization_config")  # which the class, the caller and the loader say
POINTS = {
    "input_layernorm": "attn_norm", "self_attn.kv_a_proj_with_mqa": "attn.kv_a",
    "self_attn.kv_a_layernorm": "attn.c_kv", "self_attn.o_proj": "attn.out", "post_attention_layernorm": "ffn_norm",
    "mlp": "ffn.out", "": "hidden",
}  # fmt: skip


def load(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a checkpoint, by its architecture: transformers does not know every model_type of the family."""
    raw = json.loads((folder / "config.json").read_text())
    kind = raw["architectures"][0].removesuffix("ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**{k: v for k, v in raw.items() if k not in CONFIG_ONLY})
    config._attn_implementation = "eager"
    stored = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    for name in [name for name in stored if name.endswith("_scale_inv")]:  # its own FP8 needs a GPU
        scale = stored.pop(name).repeat_interleave(128, 0).repeat_interleave(128, 1)
        weight = stored[name.removesuffix("_scale_inv")].float()
        stored[name.removesuffix("_scale_inv")] = weight * scale[: weight.shape[0], : weight.shape[1]]
    cls = getattr(transformers, f"{kind}ForCausalLM")
    return cls.from_pretrained(None, config=config, state_dict=stored, dtype=dtype, local_files_only=True).eval()


@torch.no_grad()
def answer(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Logits (T, V), and what POINTS names of every layer."""
    model, found = load(folder, dtype), {}

    def keep(name: str, module: nn.Module, given: Any, out: Any) -> None:
        found[name] = (out[0] if isinstance(out, tuple) else out).detach().reshape(len(tokens), -1).clone()

    for i, layer in enumerate(model.model.layers):
        for module, point in POINTS.items():
            layer.get_submodule(module).register_forward_hook(partial(keep, f"layers.{i}.{point}"))
    model.model.norm.register_forward_hook(partial(keep, "norm"))
    logits = model(torch.tensor([tokens])).logits[0]
    return {name: value.contiguous() for name, value in found.items()} | {"logits": logits.contiguous()}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    checkpoint, given, output = map(Path, sys.argv[-3:])
    asked = json.loads(given.read_text())
    kept = torch.bfloat16 if asked["format"] == "bfloat16" else torch.float32
    save_file(answer(checkpoint, asked["tokens"], kept), output)
