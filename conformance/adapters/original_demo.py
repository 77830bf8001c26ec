"""The original repository's model.py, from its user's own copy, behind the conformance suite's protocol, on a CPU.

    git clone https://github.com/deepseek-ai/DeepSeek-V3 .peers/DeepSeek-V3
    python conformance/check_port.py --command "python conformance/adapters/original_demo.py .peers/DeepSeek-V3"

Its kernels need a GPU: `import kernel` gives it this project's functions of the same names, in this process alone.
model.py has a bias in its gates where the hidden size is 7168 and nowhere else; it is put there. In float32 its modules
are widened after they are made. Nothing else is changed.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

INFERENCE = Path(__file__).resolve().parents[2] / "inference"
NAMES = {  # Hugging Face's parts of a tensor's name, and model.py's
    "embed_tokens": "embed", "lm_head": "head", "self_attn": "attn", "mlp": "ffn",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq", "q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b", "o_proj": "wo",
    "kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b",
    "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
    "e_score_correction_bias": "bias", "weight_scale_inv": "scale",
}  # fmt: skip


def load_module(repository: Path) -> Any:
    """model.py of the copy, with this project's functions (ops/reference.py) as its kernels."""
    path = repository / "inference" / "model.py"
    if not path.is_file():
        sys.exit(f"error: there is no {path}: name the directory of a copy of deepseek-ai/DeepSeek-V3")
    sys.path.append(str(INFERENCE))
    from ops import reference

    def fp8_gemm(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor) -> Tensor:
        y = reference.fp8_gemm(a.flatten(0, -2), a_s.flatten(0, -2), b, b_s, torch.get_default_dtype())
        return y.unflatten(0, a.shape[:-1])

    kernels: Any = ModuleType("kernel")
    kernels.act_quant = reference.act_quant
    kernels.weight_dequant = lambda w, s, block_size=128: reference.weight_dequant(w, s, torch.get_default_dtype())
    kernels.fp8_gemm = fp8_gemm
    sys.modules["kernel"] = kernels
    spec = importlib.util.spec_from_file_location("original_model", path)
    assert spec and spec.loader
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(raw: dict[str, Any], module: Any, fp8: bool) -> Any:
    """model.py's ModelArgs, by its own names."""
    rope = raw.get("rope_scaling") or {"factor": 1.0}
    quantised = raw.get("quantization_config") or {}
    return module.ModelArgs(
        max_batch_size=1, max_seq_len=raw["max_position_embeddings"], dtype="fp8" if fp8 else "bf16",
        scale_fmt=quantised.get("scale_fmt"), vocab_size=raw["vocab_size"], dim=raw["hidden_size"],
        inter_dim=raw["intermediate_size"], moe_inter_dim=raw["moe_intermediate_size"],
        n_layers=raw["num_hidden_layers"], n_dense_layers=raw["first_k_dense_replace"],
        n_heads=raw["num_attention_heads"], n_routed_experts=raw["n_routed_experts"],
        n_shared_experts=raw["n_shared_experts"], n_activated_experts=raw["num_experts_per_tok"],
        n_expert_groups=raw["n_group"], n_limited_groups=raw["topk_group"],
        score_func=raw.get("scoring_func", "sigmoid"), route_scale=raw["routed_scaling_factor"],
        q_lora_rank=raw["q_lora_rank"] or 0, kv_lora_rank=raw["kv_lora_rank"],
        qk_nope_head_dim=raw["qk_nope_head_dim"], qk_rope_head_dim=raw["qk_rope_head_dim"],
        v_head_dim=raw["v_head_dim"], rope_theta=raw["rope_theta"], rope_factor=rope["factor"],
        original_seq_len=rope.get("original_max_position_embeddings", 4096), beta_fast=rope.get("beta_fast", 32),
        beta_slow=rope.get("beta_slow", 1), mscale=rope.get("mscale_all_dim", 1.0),
    )  # fmt: skip


def own_name(name: str) -> str:
    """A tensor's name in model.py."""
    parts = [NAMES.get(part, part) for part in name.removeprefix("model.").split(".")]
    return ".".join(part for i, part in enumerate(parts) if not (part == "weight" and parts[i + 1 :] == ["scale"]))


@torch.inference_mode()
def answer(folder: Path, tokens: list[int], repository: Path, format: str) -> dict[str, Tensor]:
    """Logits (T, V): model.py returns the last position's, its head on the others is applied here."""
    module, raw = load_module(repository), json.loads((folder / "config.json").read_text())
    fp8, exact = format.startswith("w8a8") and "quantization_config" in raw, "bfloat16" not in format
    module.gemm_impl = "fp8" if fp8 else "bf16"
    torch.set_default_dtype(torch.float32 if exact else torch.bfloat16)
    model = module.Transformer(arguments(raw, module, fp8))
    if raw["model_type"] != "deepseek_v2":
        for gate in (part for part in model.modules() if isinstance(part, module.Gate)):
            gate.bias = nn.Parameter(torch.zeros(raw["n_routed_experts"], dtype=torch.float32), requires_grad=False)
    for parameter in model.parameters() if exact else ():
        if parameter.element_size() > 1:
            parameter.data = parameter.data.float()
    stored = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    mtp = f"model.layers.{raw['num_hidden_layers']}."
    for name, parameter in dict(model.named_parameters()).items():
        [own] = [theirs for theirs in stored if not theirs.startswith(mtp) and own_name(theirs) == name]
        value = stored[own]
        if value.dtype == torch.float8_e4m3fn and not fp8:
            value = sys.modules["kernel"].weight_dequant(value, stored[f"{own}_scale_inv"])
        parameter.data.copy_(value)
    kept: list[Tensor] = []
    model.norm.register_forward_hook(lambda _, __, out: kept.append(out[0]))
    model(torch.tensor([tokens]))
    return {"logits": model.head(kept[0]).float()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("repository", type=Path, help="a copy of deepseek-ai/DeepSeek-V3")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    asked = json.loads(options.input.read_text())
    found = answer(options.checkpoint, asked["tokens"], options.repository, asked["format"])
    save_file({name: t.contiguous() for name, t in found.items()}, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
