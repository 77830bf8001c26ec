"""Time and peak memory of convert.py and fp8_cast_bf16.py on a random FP8 checkpoint of more than 6 GB.

    python benchmarks/bench_convert.py --output benchmarks/results/convert.json

The checkpoint has the released V3's widths, vocabulary and MTP module, with fewer layers and experts. Each command runs
in a process of its own, whose /proc/PID/status is read every 10 ms: VmHWM is its peak memory, mapped file pages
included, RssAnon the anonymous part. Needs about three times the checkpoint's size of disk.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors  # noqa: F401 (its version belongs to the record)
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "inference"))
import report
from checkpoint.manifest import HF_INDEX
from checkpoint.table import expected_tensors
from checkpoint.writing import Writer
from core.config import ModelArgs

INFERENCE = Path(__file__).parent.parent / "inference"
MIB = 1 << 20
LIMIT = 6144  # MiB, what a conversion may take
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


def make(folder: Path, config: dict[str, Any]) -> int:
    """Writes a random checkpoint in Hugging Face's layout, its tensors in the released order; returns its bytes."""
    torch.manual_seed(0)
    blocks = {d: random_block(d) for d in (torch.float8_e4m3fn, torch.bfloat16, torch.float32)}
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    room = SHARD
    total = 0
    for spec in expected_tensors(ModelArgs.from_hf(config), quantised=True).values():
        nbytes = torch.Size(spec.shape).numel() * spec.dtype.itemsize
        if nbytes > room:
            shards.append({})
            room = SHARD
        shards[-1][spec.hf] = spec.dtype, spec.shape
        room -= nbytes
        total += nbytes
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        writer = Writer(folder / file, tensors, {"format": "pt"})
        for name, (dtype, shape) in tensors.items():
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            for at in range(0, nbytes, len(blocks[dtype])):
                writer.write(name, blocks[dtype][: nbytes - at], at)
        writer.close()
    (folder / HF_INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def measure(command: list[str], output: Any = None, status: int = 0) -> dict[str, float]:
    """Runs a command, which has to end with that status: seconds, and its peak memory in MiB, whole (which the kernel
    keeps count of) and anonymous."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
    peak = {"VmHWM": 0, "RssAnon": 0}
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]))
        time.sleep(0.01)
    if process.returncode != status:
        sys.exit(f"{' '.join(command)} failed with status {process.returncode}")
    seconds = round(time.monotonic() - began, 1)
    return {"seconds": seconds, "peak_mib": peak["VmHWM"] // 1024, "peak_anonymous_mib": peak["RssAnon"] // 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--layers", type=int, default=V3["num_hidden_layers"], help="layers of the checkpoint")
    parser.add_argument("--temp", help="where to put the data, which is removed afterwards")
    parser.add_argument("--output", help="JSON file for the results")
    options = parser.parse_args()
    config = V3 | {"num_hidden_layers": options.layers}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.temp) as temp:
        source, target = Path(temp, "source"), Path(temp, "target")
        source.mkdir()
        nbytes = make(source, config)
        print(f"checkpoint of {nbytes / 1e9:.2f} GB, {options.layers} layers, {config['n_routed_experts']} experts\n")
        to_ranks = [INFERENCE / "convert.py", "--hf-ckpt-path", source, "--save-path", target]
        to_bf16 = [
            INFERENCE / "fp8_cast_bf16.py",
            "--input-fp8-hf-path",
            source,
            "--output-bf16-hf-path",
            target,
        ]
        commands: dict[str, list[Any]] = {f"convert for {n}": [*to_ranks, "--model-parallel", n] for n in options.ranks}
        commands["cast to bf16 on the CPU"] = [*to_bf16, "--device", "cpu"]
        for name, command in commands.items():
            figures = measure([sys.executable, *map(str, command)])
            written = [path.stat().st_size for path in target.glob("*.safetensors")]
            speed = round(nbytes / 1e6 / figures["seconds"])
            rows.append({"what": name, "bytes_read": nbytes} | figures | {
                "mb_read_per_second": speed, "files": len(written), "bytes_written": sum(written),
                "largest_file_bytes": max(written),
            })  # fmt: skip
            shutil.rmtree(target)
    shown = ("what", "seconds", "mb_read_per_second", "peak_mib", "peak_anonymous_mib", "files", "largest_file_bytes")
    print(
        report.table([name.replace("_", " ") for name in shown], [[str(row[name]) for name in shown] for row in rows])
    )
    report.save(options.output, rows)
    worst = max(row["peak_mib"] for row in rows)
    print(json.dumps({"benchmark": "convert", "peak_mib": worst, "limit_mib": LIMIT, "within": worst <= LIMIT}))
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
