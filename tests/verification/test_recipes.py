"""The recipes of docs/verifying.md: those for programs that can run here write traces that verify.py reads."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import load_config
from support import processes as launch
from support.families import two_layers
from support.model_pairs import random_checkpoint, tokens
from support.rank_weights import write_upstream
from verification.check import check
from verification.trace_reading import read_trace
from verification.weights import Weights

ROOT = Path(__file__).parents[2]
ORIGINAL = ROOT / ".peers" / "DeepSeek-V3" / "inference"  # git clone https://github.com/deepseek-ai/DeepSeek-V3 into .peers
TOKENS = tokens(30, 256, 5)


def recipes() -> dict[str, str]:
    text = (ROOT / "docs" / "verifying.md").read_text()
    return dict(re.findall(r"```python\n# recipe: (\w+)\n(.*?)```", text, re.DOTALL))


def test_there_are_recipes() -> None:
    """Short ones, which are Python, and whose points exist."""
    from verification.points import POINTS

    found = recipes()
    assert set(found) == {"transformers", "original", "vllm"}
    known = {point.name for point in POINTS}
    for code in found.values():
        ast.parse(code)
        assert len(code.splitlines()) <= 42
        names = set(re.findall(r'"(attn\.[a-z_]+|ffn\.[a-z_]+|\w+_norm|after_attn|hidden|norm|logits|embed)"', code))
        ours = {name for name in names if name in known}
        assert len(ours) >= 6


@pytest.mark.parametrize("family", ["v3", "moonlight"])
def test_transformers(tmp_path: Path, family: str) -> None:
    """As it stands in the document, on a checkpoint that transformers loads."""
    path = random_checkpoint(tmp_path / "c", two_layers(family) | {"num_nextn_predict_layers": 0})
    scope: dict[str, Any] = {}
    exec(compile(recipes()["transformers"], "recipe", "exec"), scope)
    scope["record"](path, TOKENS, tmp_path / "t")
    report = check(read_trace(tmp_path / "t"), Weights(path))
    assert report.first is None and len(report.requests[0].points) > 20
    assert not [name for name in report.requests[0].missing if name.endswith(("hidden", "logits", "ffn.ids"))]


@pytest.mark.skipif(not ORIGINAL.exists(), reason="the original repository is not in .peers")
def test_the_original(tmp_path: Path) -> None:
    """Its model.py in bfloat16 on a CPU. Its router computes in bfloat16, and the report says so where that shows."""
    path = random_checkpoint(tmp_path / "c", two_layers("v2-lite"))
    write_upstream(path, tmp_path / "u", 1, two_layers("v2-lite"))
    args = load_config(path / "config.json")
    names = ("vocab_size dim inter_dim moe_inter_dim n_layers n_dense_layers n_heads n_routed_experts n_shared_experts "
             "n_activated_experts n_expert_groups n_limited_groups score_func route_scale q_lora_rank kv_lora_rank "
             "qk_nope_head_dim qk_rope_head_dim v_head_dim original_seq_len rope_theta rope_factor beta_fast beta_slow").split()
    config = {name: getattr(args, name) for name in names} | {"mscale": args.mscale_all_dim, "max_seq_len": 128}
    (tmp_path / "recipe.py").write_text(recipes()["original"])
    script = ROOT / "tests" / "support" / "run_original.py"
    command = [sys.executable, script, ORIGINAL, tmp_path / "recipe.py", tmp_path / "u" / "model0-mp1.safetensors",
               json.dumps(config), json.dumps(TOKENS), tmp_path / "t"]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=launch.environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    trace = read_trace(tmp_path / "t")
    assert trace.numerics.dtype == "bfloat16" and torch.equal(trace.requests[0].tokens, torch.tensor(TOKENS))
    report = check(trace, Weights(path)).requests[0]
    wrong = {j.name: [cause.name for cause in report.causes[j.name]] for j in report.points if j.diverges}
    assert set(wrong) <= {"layers.1.ffn.ids", "layers.1.ffn.weights"} and len(report.points) > 20
    assert all("router-bf16" in causes for causes in wrong.values()), wrong
