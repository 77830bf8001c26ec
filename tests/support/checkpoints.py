"""Small random checkpoints on disk, in exactly the layout of the released ones, for any config (see families.py).

Written from the public description of the tensors, not from `checkpoint/table.py`, so that a mistake in that shows.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BLOCK = 128


def fp8_sizes(ranks: int = 8) -> dict[str, Any]:
    """Changes to a V3 config so that every split weight falls into whole 128x128 blocks on that many ranks, while
    hidden size and the queries' rank, which are not split, end in part of a block."""
    return {
        "hidden_size": 192, "num_attention_heads": 2 * ranks, "num_key_value_heads": 2 * ranks, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64, "v_head_dim": 64, "intermediate_size": 128 * ranks,
        "moe_intermediate_size": 128, "n_shared_experts": ranks, "q_lora_rank": 160, "kv_lora_rank": 128,
    }  # fmt: skip


def make_checkpoint(
    path: str | Path, hf_config: dict[str, Any], fp8: bool = False, seed: int = 0, shard_bytes: int = 1 << 20
) -> None:
    """Writes a random checkpoint: sharded safetensors with an index, and config.json.

    Norm weights lie around 1 with spread 0.2; the router's bias is N(0, 0.5) - 1 in float32; other weights are
    N(0, 1/sqrt(in)) in bfloat16 or, where the released models have them, in FP8 with a float32 scale per 128x128 block
    (a power of two if hf_config asks for ue8m0). Each scale lies in the shard after its weight's, when there are more
    than one. A checkpoint whose tensors fit in shard_bytes still gets an index.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    config = dict(hf_config)
    quantisation = config.pop("quantization_config", {})
    if fp8:
        config["quantization_config"] = quantisation | {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    ue8m0 = quantisation.get("scale_fmt") == "ue8m0"

    shards: list[dict[str, torch.Tensor]] = [{}]
    scales: list[dict[str, torch.Tensor]] = [{}]
    room = shard_bytes
    for name, shape, quantised in _tensors(config):
        if name.endswith("e_score_correction_bias"):
            weight = torch.randn(shape, generator=generator) * 0.5 - 1
        elif len(shape) == 1:
            weight = (1 + 0.2 * torch.randn(shape, generator=generator)).bfloat16()
        elif name.endswith(("embed_tokens.weight", "shared_head.head.weight")) and name.count("layers"):
            main = "model.embed_tokens.weight" if "embed" in name else "lm_head.weight"
            weight = next(shard[main] for shard in shards if main in shard).clone()
        else:
            weight = (torch.randn(shape, generator=generator) / math.sqrt(shape[-1])).bfloat16()
        scale = None
        if fp8 and quantised:
            weight, scale = quantise(weight.float(), ue8m0)
        if weight.nbytes > room and shards[-1]:
            shards.append({})
            scales.append({})
            room = shard_bytes
        room -= weight.nbytes
        shards[-1][name] = weight
        if scale is not None:
            scales[-1][name + "_scale_inv"] = scale
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        held = shard | scales[i - 1]
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    total = sum(t.nbytes for shard in (*shards, *scales) for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def quantise(weight: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (N, K) to e4m3 (N, K) and float32 scales (ceil(N/128), ceil(K/128)), each block's largest value at 448
    (or, with ue8m0, at most there)."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-4) / 448
    if ue8m0:
        scale = torch.exp2(scale.log2().ceil())
    q = (blocks / scale[:, None, :, None]).clamp(-448, 448).reshape(padded.shape)[:rows, :columns]
    return q.to(torch.float8_e4m3fn).contiguous(), scale.contiguous()


def dequantise(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 (N, K) that e4m3 (N, K) and its block scales mean."""
    rows, columns = q.shape
    whole = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return q.float() * whole[:rows, :columns]


def _tensors(c: dict[str, Any]) -> list[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, whether the released FP8 checkpoints store it in FP8) of every tensor, in layer order."""
    hidden, vocab, heads = c["hidden_size"], c["vocab_size"], c["num_attention_heads"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    latent, q_rank, experts = c["kv_lora_rank"], c["q_lora_rank"], c["n_routed_experts"]
    found: list[tuple[str, tuple[int, ...], bool]] = [("model.embed_tokens.weight", (vocab, hidden), False)]

    def mlp(prefix: str, width: int) -> None:
        found.append((f"{prefix}.gate_proj.weight", (width, hidden), True))
        found.append((f"{prefix}.up_proj.weight", (width, hidden), True))
        found.append((f"{prefix}.down_proj.weight", (hidden, width), True))

    def layer(i: int) -> None:
        at = f"model.layers.{i}"
        found.append((f"{at}.input_layernorm.weight", (hidden,), False))
        found.append((f"{at}.post_attention_layernorm.weight", (hidden,), False))
        if q_rank:
            found.append((f"{at}.self_attn.q_a_proj.weight", (q_rank, hidden), True))
            found.append((f"{at}.self_attn.q_a_layernorm.weight", (q_rank,), False))
            found.append((f"{at}.self_attn.q_b_proj.weight", (heads * (nope + rope), q_rank), True))
        else:
            found.append((f"{at}.self_attn.q_proj.weight", (heads * (nope + rope), hidden), True))
        found.append((f"{at}.self_attn.kv_a_proj_with_mqa.weight", (latent + rope, hidden), True))
        found.append((f"{at}.self_attn.kv_a_layernorm.weight", (latent,), False))
        found.append((f"{at}.self_attn.kv_b_proj.weight", (heads * (nope + value), latent), True))
        found.append((f"{at}.self_attn.o_proj.weight", (hidden, heads * value), True))
        if i < c["first_k_dense_replace"]:
            mlp(f"{at}.mlp", c["intermediate_size"])
            return
        found.append((f"{at}.mlp.gate.weight", (experts, hidden), False))
        if c["topk_method"] == "noaux_tc":
            found.append((f"{at}.mlp.gate.e_score_correction_bias", (experts,), False))
        for e in range(experts):
            mlp(f"{at}.mlp.experts.{e}", c["moe_intermediate_size"])
        if c["n_shared_experts"]:
            mlp(f"{at}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])

    for i in range(c["num_hidden_layers"]):
        layer(i)
    found.append(("model.norm.weight", (hidden,), False))
    if not c.get("tie_word_embeddings"):
        found.append(("lm_head.weight", (vocab, hidden), False))
    for i in range(c.get("num_nextn_predict_layers") or 0):
        at = f"model.layers.{c['num_hidden_layers'] + i}"
        layer(c["num_hidden_layers"] + i)
        found.append((f"{at}.embed_tokens.weight", (vocab, hidden), False))
        found.append((f"{at}.enorm.weight", (hidden,), False))
        found.append((f"{at}.hnorm.weight", (hidden,), False))
        found.append((f"{at}.eh_proj.weight", (hidden, 2 * hidden), False))
        found.append((f"{at}.shared_head.norm.weight", (hidden,), False))
        found.append((f"{at}.shared_head.head.weight", (vocab, hidden), False))
    return found
