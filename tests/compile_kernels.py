"""Compiles kernel configurations without a GPU and prints what came out, as one JSON object.

    python compile_kernels.py kernel sm_90    every configuration that a module's configurations() list for a target
    python compile_kernels.py controls        two that must be found wanting

A program of its own, because Triton's interpreter, in which the other tests run, takes the place of the compiler.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "inference"))
import kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_(c: kernel.Configuration) -> Any:
    """Compiles as a launch would: told that pointers, and all sizes but M, are multiples of 16."""
    names = c.kernel.arg_names
    assert set(names) == set(c.types) | set(c.constexprs), (c.name, names)
    signature = {n: c.types.get(n, "constexpr") for n in names}
    aligned = [n for n in c.types if c.types[n].startswith("*") or n in ("N", "K")]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    amd = c.target.startswith("gfx")
    target = GPUTarget("hip", c.target, 64) if amd else GPUTarget("cuda", int(c.target.removeprefix("sm_")), 32)
    return triton.compile(ASTSource(c.kernel, signature, c.constexprs, attrs), target=target, options=c.options)


def report(compiled: Any) -> dict[str, Any]:
    """Registers a thread, bytes of stack (spills are there), bytes of shared memory, how often each instruction occurs,
    and whether a product or a cast takes subnormal numbers for zeros."""
    found = {"shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        number = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
        found["registers"] = number["vgpr_count"]
        found["stack"] = number["private_segment_fixed_size"] + number["vgpr_spill_count"] + number["sgpr_spill_count"]
        found["flushes"] = not re.search(r"\.amdhsa_float_denorm_mode_32 3\b", code)
        found["instructions"] = Counter(re.findall(r"^\s+([a-z]\w+)", code, re.MULTILINE))
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    found["registers"] = number["REG"]
    found["stack"] = number["STACK"] + number["LOCAL"]
    found["flushes"] = bool(re.search(r"\b(mul|cvt)\S*\.ftz", compiled.asm["ptx"]))  # exponentials may
    found["instructions"] = Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code, re.MULTILINE)
    )
    return found


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def controls() -> Iterable[kernel.Configuration]:
    """What the tables of kernel.py avoid on sm_90: a tile too large for its threads, and 16 rows not swapped."""
    base = next(c for c in kernel.configurations() if c.name == "fp8_gemm sm_90 16x64")
    large = base.constexprs | {"BLOCK_M": 128, "BLOCK_N": 128, "SWAP": False, "STAGES": 3}
    yield replace(base, name="spills", constexprs=large)
    yield replace(base, name="not swapped", constexprs=base.constexprs | {"SWAP": False})


def main(module: str, target: str | None = None) -> None:
    listed = importlib.import_module(module).configurations() if target else controls()
    json.dump({c.name: report(compile_(c)) for c in listed if target in (None, c.target)}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
