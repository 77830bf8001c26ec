"""Run by test_cpu_levels.py as a process of its own, whose environment forces a level of instructions on torch: says as
JSON which one it got, and how far each form of the CPU's ops is from the numbers of another process.

Arguments: JSON with the checkpoint, token ids, a file of the expected logits, the -march values to compile our C with,
and questions for the demo.
"""

import json
import sys
from pathlib import Path

import torch

from core.numerics import Form, Numerics
from core.sampling_params import SamplingParams
from engine.engine import Engine
from ops.cpu import kernels
from ops.cpu.backend import CompiledCpuBackend, CpuBackend
from ops.reference_backend import ReferenceBackend
from support.model_pairs import hidden_states, ours, relative_error
from support.processor import flags_for
from support.quantised_weights import FORMS, exact, random_weight


def product_error(form: Form) -> float:
    """The largest error of products of few rows and many, as floats and in the processor's units, by float64."""
    w = random_weight(form, 130, 384)
    x, values = torch.randn(40, 384).bfloat16(), exact(w)
    expected, packed = x.double() @ values.T, kernels.pack_weight(w)
    found = [(x[:n], units) for n in (1, 2, 5, 40) for units in (False, kernels.may_use_units())]
    return max(
        relative_error(kernels.linear(rows, packed, torch.float32, units), expected[: len(rows)])
        for rows, units in found
    )


def main() -> None:
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    path, expected = Path(asked["checkpoint"]), torch.load(asked["expected"])

    def error(num: Numerics, backend: ReferenceBackend) -> float:
        model = ours(path, num, backend=backend)
        return relative_error(model.logits(hidden_states(model, asked["ids"], asked["chunks"])), expected)

    half = Numerics()
    errors = {
        "float32": error(Numerics(torch.float32), CpuBackend()),
        "float32, reference": error(Numerics(torch.float32), ReferenceBackend()),
        "reference": error(half, ReferenceBackend()),
        "torch": error(half, CpuBackend()),
        "torch, batch-invariant": error(Numerics(batch_invariant=True), CpuBackend(True)),
        "W8A8": error(Numerics(torch.bfloat16, "fp8"), CpuBackend()),
        "FP8 latents": error(Numerics(fp8_latents=True), CpuBackend()),
    }
    products = {}
    for march in asked["marches"]:
        flags = (*flags_for(f"-march={march}"), "-USLOW_PAIRS")
        found = kernels.load(kernels.build(kernels.compilers()[0], flags))
        kernels.library = lambda found=found: found
        errors[f"compiled for {march}"] = error(half, CompiledCpuBackend())
        errors[f"FP8 as it is, compiled for {march}"] = error(Numerics(torch.bfloat16, "bf16"), CompiledCpuBackend())
        fixed = error(Numerics(torch.bfloat16, "bf16", fixed_point=True), CompiledCpuBackend(fixed_point=True))
        errors[f"FP8 in fixed point, compiled for {march}"] = fixed
        products[march] = max(product_error(form) for form in FORMS.values())
    answers = []
    if asked["questions"]:
        if asked["compiled"] is False:
            kernels.library = lambda: None
        engine = Engine.from_pretrained(asked["demo"], device="cpu", max_model_len=512)
        chats = [[{"role": "user", "content": question}] for question in asked["questions"]]
        answers = [r.parts[1] for r in engine.generate(chats, SamplingParams(temperature=0, max_new_tokens=300))]
    print(
        json.dumps(
            {
                "level": torch.backends.cpu.get_cpu_capability(),
                "onednn packs bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
                "errors": errors,
                "products": products,
                "answers": answers,
            }
        )
    )


main()
