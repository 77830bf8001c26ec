"""Formats compared on some layers: the errors are those of the formats, and memory does not depend on the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.checkpoints import V3 as RELEASED

from checkpoint.manifest import HF_INDEX
from checkpoint.table import expected_tensors
from checkpoint.writing import Writer
from core.config import ModelArgs
from core.errors import UserError
from core.numerics import Numerics
from support import processes as launch
from support.checkpoints import fp8_sizes
from support.families import V3
from support.model_pairs import ours, random_checkpoint, relative_error, tokens
from verification.recorder import record_tokens
from verification.sample import Sampled, chosen_layers, formats, sample_layer, sample_layers, states, table
from verification.trace import write_trace
from verification.weights import Weights

ROOT = Path(__file__).parents[2]
CONFIG = V3 | fp8_sizes(2) | {"num_hidden_layers": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("sample") / "fp8", CONFIG, fp8=True)


def test_errors_are_those_of_the_formats(path: Path, tmp_path: Path) -> None:
    """W8A8 errs by what e4m3's four bits make, W8A16 and a BF16 cast by BF16's nine; experts may be others. The layer
    that the engine computes in each format, from the same states, is as far from exact."""
    ids = tokens(24, 256)
    exact = record_tokens(ours(path), [ids], mtp=False)
    write_trace(exact, tmp_path / "t")
    rows = sample_layers(path, None, "0,2", 24, tmp_path / "t")
    assert [(row.layer, row.format) for row in rows[:4]] == [(0, name) for name in formats(Weights(path))] and len(rows) == 8
    by_name = {(row.layer, row.format): row for row in rows}
    for layer in (0, 2):
        w8a8, w8a16, cast = (by_name[layer, name] for name in ("W8A8", "W8A16", "BF16 cast"))
        assert 0.01 < w8a8.attn_out < 0.12 and 0.001 < w8a16.attn_out < 0.012 and 0.001 < cast.attn_out < 0.012
        assert w8a8.attn_out > 3 * w8a16.attn_out and (w8a8.other_experts is None) == (layer == 0)
    last = by_name[2, "W8A8"]
    assert last.forced is not None and last.other_experts is not None
    assert 0.02 < last.forced < 0.08 and 0 <= last.other_experts < 0.2 and by_name[2, "W8A16"].forced < 0.012  # type: ignore[operator]
    # layer 0 in W8A8 by the engine itself
    run = record_tokens(ours(path, Numerics(torch.bfloat16, gemm="fp8")), [ids], mtp=False).requests[0]
    own = relative_error(run.points["layers.0.attn.out"], exact.requests[0].points["layers.0.attn.out"])
    assert own == pytest.approx(by_name[0, "W8A8"].attn_out, rel=0.1)


def test_without_a_trace(path: Path) -> None:
    """Layers take embeddings then; a checkpoint of plain weights has one format."""
    weights = Weights(path)
    assert torch.equal(states(weights, 0, 5, None), states(weights, 2, 5, None))
    rows = sample_layer(weights, 1, states(weights, 1, 5, None))
    assert all(row.hidden < 1 for row in rows) and "W8A8, FP8 latents" in table(rows)
    assert "–" in table([Sampled(0, "x", 0.1, 0.1, 0.1)])


def test_wrong_use(path: Path, tmp_path: Path) -> None:
    weights = Weights(path)
    assert chosen_layers(None, weights) == [0, 1, 2] and chosen_layers("2,0", weights) == [2, 0]
    with pytest.raises(UserError, match="expected numbers such as"):
        chosen_layers("a", weights)
    with pytest.raises(UserError, match="the model has layers 0 to 2, not 3"):
        chosen_layers("1,3", weights)
    trace = record_tokens(ours(path), [[1, 2, 3]])
    del trace.requests[0].points["layers.1.hidden"], trace.requests[0].points["layers.0.hidden"]  # type: ignore[attr-defined]
    del trace.requests[0].points["layers.2.hidden"]  # type: ignore[attr-defined]
    write_trace(trace, tmp_path / "t")
    with pytest.raises(UserError, match=r"layers\.1\.hidden is missing, which layer 2 takes"):
        states(weights, 2, 3, tmp_path / "t")


def write_sparse(folder: Path, config: dict) -> int:
    """A checkpoint of zeros that takes no room on the disk, a file for each layer; returns its bytes."""
    files: dict[str, dict] = {}
    for spec in expected_tensors(ModelArgs.from_hf(config), quantised=True).values():
        files.setdefault(".".join(spec.hf.split(".")[:3]), {})[spec.hf] = spec.dtype, spec.shape
    folder.mkdir()
    total, weight_map = 0, {}
    for i, tensors in enumerate(files.values()):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        writer = Writer(folder / name, tensors, {"format": "pt"})
        (folder / name).write_bytes(writer.header)
        os.truncate(folder / name, writer.size)
        total += writer.size
        weight_map |= dict.fromkeys(tensors, name)
    (folder / HF_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def peak_mib(folder: Path, layers: str, n: int) -> int:
    command = [sys.executable, str(ROOT / "tests" / "support" / "memory_of_a_sample.py"), str(folder), layers, str(n)]
    paths = os.pathsep.join(str(ROOT / name) for name in ("inference", "tests"))
    done = subprocess.run(command, capture_output=True, text=True, env=launch.environment(PYTHONPATH=paths), timeout=900)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_is_far_below_the_models(tmp_path: Path) -> None:
    """16 billion parameters, as large as V2-Lite, of which a layer is sampled in a few hundred MiB."""
    config = RELEASED | {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64,
                         "num_hidden_layers": 27, "num_attention_heads": 16, "vocab_size": 102400}  # fmt: skip
    assert write_sparse(tmp_path / "c", config) > 15e9
    assert peak_mib(tmp_path / "c", "1", 2) < 500


@pytest.mark.trust
def test_memory_does_not_depend_on_the_model(tmp_path: Path) -> None:
    """The released model, 671 billion parameters in 61 layers, in the memory of a laptop; and no more than of three."""
    released = RELEASED | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256}
    three = released | {"num_hidden_layers": 3, "first_k_dense_replace": 2}
    assert write_sparse(tmp_path / "all", released) > 680e9 and write_sparse(tmp_path / "three", three) > 20e9
    peaks = peak_mib(tmp_path / "three", "0,2", 8), peak_mib(tmp_path / "all", "0,60", 8)
    assert peaks[0] < 1200 and peaks[1] < peaks[0] + 500, peaks  # which are the headers of 91,991 tensors
