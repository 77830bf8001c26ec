"""A trace of transformers' own classes, by hooks on their modules, in float32 on a CPU. Only verify.py imports it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.errors import UserError, first_line
from verification.trace import RequestTrace, RunNumerics, Trace

HOOKS: dict[str, str] = {  # by a module's name within a layer: the point that its output is
    "input_layernorm": "attn_norm", "self_attn.q_a_proj": "attn.q_a", "self_attn.q_a_layernorm": "attn.c_q",
    "self_attn.kv_a_proj_with_mqa": "attn.kv_a", "self_attn.kv_a_layernorm": "attn.c_kv",
    "self_attn.o_proj": "attn.out", "post_attention_layernorm": "ffn_norm", "mlp.experts": "ffn.routed",
    "mlp.shared_experts": "ffn.shared",
    "mlp": "ffn.out", "": "hidden",
}  # fmt: skip
TOP = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "logits"}


def transformers_trace(path: Path, tokens: list[int], prepare: Callable[[Any], object] = lambda model: None) -> Trace:
    """What transformers computes of tokens with a checkpoint of plain weights. `prepare` is called with its model.
    Raises UserError where transformers is missing or cannot load the checkpoint."""
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    raw = json.loads((path / "config.json").read_text())
    if raw.get("quantization_config"):
        raise UserError(f"{path}: quantised; give transformers plain weights (fp8_cast_bf16.py writes them)")
    family = (raw.get("architectures") or [""])[0].removesuffix("ForCausalLM")
    raw = {key: value for key, value in raw.items() if key not in ("model_type", "torch_dtype", "dtype")}
    try:
        config = getattr(transformers, f"{family}Config")(**raw)
        config._attn_implementation = "eager"
        cls = getattr(transformers, f"{family}ForCausalLM")
        model = cls.from_pretrained(path, config=config, dtype=torch.float32, local_files_only=True).eval()
    except Exception as e:  # theirs, of any kind
        raise UserError(f"transformers cannot load {path}: {first_line(e)}") from None
    prepare(model)
    points = record(model, tokens, config.qk_nope_head_dim)
    layout: Any = "interleaved" if family == "DeepseekV2" else "halves"  # as its functions return what they rotated
    program = f"transformers {transformers.__version__}, {family}"
    return Trace([RequestTrace("0", torch.tensor(tokens), points)], RunNumerics(), layout, program)


def record(model: Any, tokens: list[int], dn: int) -> dict[str, torch.Tensor]:
    """The points of a forward of one sequence."""
    points: dict[str, torch.Tensor] = {}
    undo: list[Callable[[], object]] = []

    def keep(name: str, value: torch.Tensor) -> None:
        value = value[0] if value.dim() > 2 else value  # of the only sequence
        points[name] = value.detach().clone()

    def output(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, out: keep(name, out[0] if isinstance(out, tuple) else out)

    for name, point in TOP.items():
        undo.append(model.get_submodule(name).register_forward_hook(output(point)).remove)
    for i, layer in enumerate(model.model.layers):
        at = f"layers.{i}."
        for name, point in HOOKS.items():
            module = next((m for n, m in layer.named_modules() if n == name), None)
            if module is not None:
                undo.append(module.register_forward_hook(output(at + point)).remove)

        def router(module: Any, args: Any, out: Any, at: str = at) -> None:
            for point, value in zip(("router_logits", "weights", "ids"), out, strict=True):
                keep(f"{at}ffn.{point}", value)

        def residual(module: Any, args: Any, at: str = at) -> None:
            keep(f"{at}after_attn", args[0])

        undo.append(layer.post_attention_layernorm.register_forward_pre_hook(residual).remove)
        if hasattr(layer.mlp, "gate"):
            undo.append(layer.mlp.gate.register_forward_hook(router).remove)
    modeling: Any = sys.modules[type(model).__module__]
    attend = modeling.eager_attention_forward

    def recorded(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **more: Any) -> Any:
        at = f"layers.{module.layer_idx}.attn."
        heads = query.transpose(1, 2)  # (1, T, N, dn + R)
        keep(f"{at}q_nope", heads[..., :dn])
        keep(f"{at}q_rope", heads[..., dn:])
        keep(f"{at}k_rope", key[:, 0, :, dn:])
        out = attend(module, query, key, *args, **more)
        keep(f"{at}o", out[0])
        return out

    modeling.eager_attention_forward = recorded
    try:
        with torch.inference_mode():
            model(torch.tensor([tokens]), use_cache=False)
    finally:
        modeling.eager_attention_forward = attend
        for remove in undo:
            remove()
    return points
