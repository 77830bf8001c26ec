"""Peak memory of DeepSeek-V2-Lite's shape, 15.7 billion parameters, on a CPU with its weights in INT4 and FP8.

    python benchmarks/quantised_memory.py --output benchmarks/results/quantised_memory.json

A random checkpoint of that shape is written in each form: FP8 blocks as quantize.py writes them, and INT4 groups of 32
in the routed experts, everything else BF16. generate.py loads it in a process of its own and answers one prompt with 64
tokens, with room for 4,096; plan.py says beforehand what that takes. The process's /proc/PID/status is read every
10 ms; what a process takes that only imports the engine is shown beside it. Needs 17 GB of disk, and of memory what it
shows.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lib import INFERENCE, report
from lib.checkpoints import random_block
from lib.machine import measure_child

import plan
from checkpoint.manifest import HF_INDEX
from checkpoint.quantize import quantization_config
from checkpoint.table import expected_tensors
from checkpoint.writing import Writer
from core.config import ModelArgs

V2_LITE = {  # https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite-Chat
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "first_k_dense_replace": 1,
    "num_attention_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1,
    "topk_group": 1, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 10000, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
LIMITS = {"int4": 16, "fp8": 24}  # GB, of the machine that it is meant for
RUN = ["--max-model-len", "4096", "--max-num-seqs", "1", "--max-num-batched-tokens", "512"]
DEMO = INFERENCE.parent / "demo" / "checkpoint"


def stored(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """A tensor of the table as compressed-tensors names and stores it."""
    if dtype == torch.uint8:
        return {f"{name}_packed": (torch.int32, (shape[0], shape[1] // 4)), f"{name}_shape": (torch.int64, (2,))}
    return {name.replace("_scale_inv", "_scale") if dtype == torch.bfloat16 else name: (dtype, shape)}


def write(folder: Path, form: str) -> int:
    """Writes a random checkpoint, a file a layer; returns its bytes."""
    groups: dict[str, Any] = {"fp8": 0, "int4": 32}
    config = V2_LITE | {"quantization_config": quantization_config(form, groups[form], False)}  # type: ignore[arg-type]
    files: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for spec in expected_tensors(ModelArgs.from_hf(config), quantised=True).values():
        layer = spec.hf.split(".")[2] if ".layers." in spec.hf else "top"
        files.setdefault(f"model-{layer}.safetensors", {}).update(stored(spec.hf, spec.dtype, spec.shape))
    torch.manual_seed(0)
    blocks = {dtype: random_block(dtype) for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32)}
    blocks[torch.int32] = torch.randint(256, blocks[torch.bfloat16].shape, dtype=torch.uint8)
    small = {torch.float32: 2.0**-12, torch.bfloat16: 2.0**-8}
    total, weight_map = 0, {}
    for file, tensors in files.items():
        writer = Writer(folder / file, tensors, {"format": "pt"})
        for name, (dtype, shape) in tensors.items():
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            total += nbytes
            weight_map[name] = file
            if name.endswith("_shape"):
                n, words = tensors[name.replace("_shape", "_packed")][1]
                writer.write(name, torch.tensor([n, words * 8]).view(torch.uint8), 0)
            elif "norm" in name or "_scale" in name:
                value = 1.0 if "norm" in name else small[dtype]
                writer.write(name, torch.full(shape, value, dtype=dtype).view(-1).view(torch.uint8), 0)
            else:
                for at in range(0, nbytes, len(blocks[dtype])):
                    writer.write(name, blocks[dtype][: nbytes - at], at)
        writer.close()
    (folder / HF_INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    for path in DEMO.glob("*token*"):
        shutil.copy(path, folder)
    return total


def planned(folder: Path, *where: str) -> int:
    """Bytes that plan.py says a run takes."""
    return plan.plan(plan.parse(["--ckpt-path", str(folder), *RUN, *where]))["rank"]["total"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--forms", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--temp", help="where to put the data, which is removed afterwards")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    imports = measure_child([sys.executable, "-c", "import engine.engine"], folder=str(INFERENCE))["peak_mib"]
    rows: list[dict[str, Any]] = []
    for form in options.forms:
        with tempfile.TemporaryDirectory(dir=options.temp) as temp:
            folder, prompts = Path(temp, form), Path(temp, "prompts.txt")
            folder.mkdir()
            nbytes = write(folder, form)
            prompts.write_text("What is 12 plus 30?")
            command = [sys.executable, INFERENCE / "generate.py", "--ckpt-path", folder, "--input-file", prompts, *RUN,
                       "--max-new-tokens", "64", "--temperature", "0", "--raw"]  # fmt: skip
            figures = measure_child(list(map(str, command)))
            gpu, cpu = planned(folder, "--device", "cuda"), planned(folder, "--device", "cpu")
        fits = figures["peak_mib"] * 2**20 <= LIMITS[form] * 10**9 and gpu <= 24e9
        rows.append({"form": form, "checkpoint_bytes": nbytes, "planned_cpu": cpu, "planned_gpu": gpu} | figures
                    | {"imports_mib": imports, "limit_gb": LIMITS[form], "fits": fits})  # fmt: skip
        print(json.dumps(rows[-1]))
    report.save(options.output, rows)
    return 0 if all(row["fits"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
