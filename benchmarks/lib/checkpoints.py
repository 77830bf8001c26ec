"""Random checkpoints of the models' shapes, in Hugging Face's layout."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from checkpoint.manifest import HF_INDEX
from checkpoint.table import expected_tensors
from checkpoint.writing import Writer
from core.config import ModelArgs

MIB = 1 << 20
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    "num_attention_heads": 128, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 10000, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1, "torch_dtype": "bfloat16",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
}  # fmt: skip
SHARD = 4 << 30  # bytes, about what the released shards have


def random_block(dtype: torch.dtype) -> torch.Tensor:
    """32 MiB of values of a kind, none of them NaN."""
    if dtype == torch.float8_e4m3fn:
        block = torch.randint(0, 256, (32 * MIB,), dtype=torch.uint8)
        return block.where((block & 0x7F) != 0x7F, 0)
    values = torch.randn(32 * MIB // dtype.itemsize)
    return (values.abs() + 0.01 if dtype == torch.float32 else values).to(dtype).view(torch.uint8)


def in_shards(config: dict[str, Any]) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Type and shape of each tensor by its name, in the released order, cut into files of SHARD bytes."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    room = SHARD
    for spec in expected_tensors(ModelArgs.from_hf(config), quantised=True).values():
        nbytes = torch.Size(spec.shape).numel() * spec.dtype.itemsize
        if nbytes > room:
            shards.append({})
            room = SHARD
        shards[-1][spec.hf] = spec.dtype, spec.shape
        room -= nbytes
    return shards


def write_random(folder: Path, config: dict[str, Any]) -> int:
    """Writes a random checkpoint in Hugging Face's layout, its tensors in the released order; returns its bytes."""
    torch.manual_seed(0)
    blocks = {d: random_block(d) for d in (torch.float8_e4m3fn, torch.bfloat16, torch.float32)}
    shards = in_shards(config)
    total = 0
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        writer = Writer(folder / file, tensors, {"format": "pt"})
        for name, (dtype, shape) in tensors.items():
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            total += nbytes
            for at in range(0, nbytes, len(blocks[dtype])):
                writer.write(name, blocks[dtype][: nbytes - at], at)
        writer.close()
    (folder / HF_INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def write_holes(folder: Path, config: dict[str, Any]) -> None:
    """Writes the headers of a checkpoint, and nothing else, into files of full length."""
    shards = in_shards(config)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards):
        file = folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file.name)
        writer = Writer(file, tensors, {"format": "pt"})
        file.write_bytes(writer.header)
        os.truncate(file, writer.size)
    (folder / HF_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def write_transformers(model: Any, path: Path) -> None:
    """Saves one of transformers' models, and in the config that it has no MTP module."""
    model.save_pretrained(path)
    raw = json.loads((path / "config.json").read_text())
    raw["num_nextn_predict_layers"] = 0
    (path / "config.json").write_text(json.dumps(raw))
