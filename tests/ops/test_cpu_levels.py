"""The model and the demo under every level of instructions that can be forced on this processor, and as on laptops where
something is missing. Each level is a process of its own; what this processor lacks is skipped, and said."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.numerics import Numerics
from ops.cpu import kernels
from ops.reference_backend import ReferenceBackend
from support.checkpoints import fp8_sizes
from support.families import V3
from support.limits import LAST_RESORT, run_within
from support.model_pairs import hidden_states, ours, random_checkpoint, tokens
from support.processes import environment
from support.processor import FEATURES

pytestmark = [
    pytest.mark.timeout(LAST_RESORT),  # what compiles has a limit of its own, of processor time
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the levels are x86's"),
]

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "checkpoint"
QUESTIONS = {"What is 347 + 285?": "632", 'Reverse the word "penguin".': "niugnep"}
NEEDS = {  # of what is forced, the feature that tells whether the processor has it
    "default": "sse2", "avx2": "avx2", "avx512": "avx512bw",
    "SSE41": "sse4_1", "AVX": "avx", "AVX2": "avx2", "AVX2_VNNI": "avx_vnni", "AVX512_CORE": "avx512bw",
    "AVX512_CORE_BF16": "avx512_bf16", "AVX512_CORE_AMX": "amx_bf16",
    "x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512bw", "cooperlake": "avx512_bf16", "sapphirerapids": "amx_bf16",
}  # fmt: skip
TORCH = ("default", "avx2", "avx512")
ONEDNN = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX")
MARCHES = ("x86-64", "x86-64-v3", "x86-64-v4", "cooperlake", "sapphirerapids")


def has(level: str) -> bool:
    return NEEDS[level] in FEATURES


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An FP8 checkpoint and its logits by the reference in float32, as this process computes them."""
    folder = tmp_path_factory.mktemp("levels")
    path = random_checkpoint(folder / "c", V3 | fp8_sizes(1) | {"num_hidden_layers": 2}, fp8=True)
    model = ours(path, Numerics(torch.float32), backend=ReferenceBackend())
    ids, chunks = tokens(60, model.args.vocab_size), [50, 9, 1]
    torch.save(model.logits(hidden_states(model, ids, chunks)), folder / "expected")
    return {"checkpoint": str(path), "ids": ids, "chunks": chunks, "expected": str(folder / "expected"), "demo": str(DEMO)}


def run(expected: dict[str, Any], capability: str, onednn: str, marches: list[str], questions: bool, compiled: bool) -> dict:
    variables = environment(
        PYTHONPATH=os.pathsep.join(map(str, (ROOT / "inference", ROOT / "tests"))),
        ATEN_CPU_CAPABILITY=capability, ONEDNN_MAX_CPU_ISA=onednn,
    )  # fmt: skip
    asked = expected | {"marches": marches, "questions": [*QUESTIONS] if questions else [], "compiled": compiled}
    done = run_within(300, [sys.executable, "-m", "support.run_at_level", json.dumps(asked)], env=variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, Any], capability: str, onednn: str, marches: list[str]) -> None:
    """The level is the one asked for, and each form within its tolerance: float32 to rounding, the others by no more
    than half again what the reference's rounding to bfloat16 makes, and those in FP8 by about two times that."""
    assert found["level"].lower() in ({"default": "no avx"}.get(capability), capability)
    if onednn in ("SSE41", "AVX", "AVX2", "AVX2_VNNI"):
        assert not found["onednn packs bfloat16"]
    errors = found["errors"]
    assert {*errors} > {f"compiled for {march}" for march in marches}
    for form, error in errors.items():
        coarse = {"W8A8": 3, "FP8 latents": 2.5}.get(form, 1.5)
        assert error < (1e-5 if form.startswith("float32") else coarse * errors["reference"]), (form, errors)
    assert {*found["products"]} == {*marches} and all(error < 1e-6 for error in found["products"].values()), found["products"]
    print(errors)
    assert errors["reference"] < 0.1


@pytest.mark.parametrize(
    "capability, onednn, marches, questions, compiled",
    [
        pytest.param("default", "SSE41", ["x86-64"], True, False, id="no vectors of AVX, no compiler"),
        pytest.param("avx2", "AVX2", ["x86-64-v3"], True, True, id="AVX2"),
        pytest.param("avx512", "AVX512_CORE", ["x86-64-v4", "cooperlake", "sapphirerapids"], False, True, id="AVX-512", marks=pytest.mark.trust),
        *(
            pytest.param(capability, onednn, MARCHES, True, compiled, id=f"{capability}-{onednn}-{compiled}", marks=pytest.mark.trust)
            for capability in TORCH for onednn in ONEDNN for compiled in (True, False)
        ),
    ],
)  # fmt: skip
def test_levels(expected, capability, onednn, marches, questions, compiled):
    if lacking := [level for level in (capability, onednn) if not has(level)]:
        pytest.skip(f"this processor has no {' and no '.join(lacking)}")
    able = [march for march in marches if has(march)] if kernels.library() is not None else []
    if left_out := [march for march in marches if march not in able]:
        print(f"left out: our C for {', '.join(left_out)}")
    found = run(expected, capability, onednn, able, questions and DEMO.exists(), compiled)
    check(found, capability, onednn, able)
    if found["answers"]:
        assert found["answers"] == [*QUESTIONS.values()]
