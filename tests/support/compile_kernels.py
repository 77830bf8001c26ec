"""Compiles kernel configurations without a GPU and prints what came out, as one JSON object.

    python compile_kernels.py [NAME…]    what kernel_configurations.py lists, and controls, which must be found wanting;
                                         or those of them that are named

A program of its own, because Triton's interpreter, in which the other tests run, takes the place of the compiler.
"""

import json
import math
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ops.gpu import attention
from ops.gpu.tiles import Tile
from support.kernel_configurations import Configuration, configurations, gemm_configuration

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_(c: Configuration) -> Any:
    """Compiles as a launch would: told that all pointers and sizes it may look at (not M) are multiples of 16."""
    names = c.kernel.arg_names
    assert set(names) == set(c.types) | set(c.constexprs), (c.name, names)
    signature = {n: c.types.get(n, "constexpr") for n in names}
    unseen = {p.name for p in c.kernel.params if p.do_not_specialize}
    aligned = [n for n, t in c.types.items() if (t == "i32" or t.startswith("*")) and n not in unseen]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    amd = c.target.startswith("gfx")
    target = GPUTarget("hip", c.target, 64) if amd else GPUTarget("cuda", int(c.target.removeprefix("sm_")), 32)
    return triton.compile(ASTSource(c.kernel, signature, c.constexprs, attrs), target=target, options=c.options)


def report(compiled: Any) -> dict[str, Any]:
    """Registers a thread, bytes of stack (spills are there), bytes of shared memory, how often each instruction occurs,
    and whether a product or a cast takes subnormal numbers for zeros; warps, and the shapes that groups of warps
    multiply."""
    found = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    products = r"warp_group_dot .*-> tensor<(\d+)x(\d+)xf32"
    found["products"] = [(int(m), int(n)) for m, n in re.findall(products, compiled.asm["ttgir"])]
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


def controls() -> Iterable[Configuration]:
    """What the tables avoid on sm_90: a tile too large for its threads, 16 rows not swapped, of attention too, and a
    request for warp specialisation that the compiler grants by computing everything twice, or ignores."""
    tiles = {
        "spills": Tile(math.inf, 128, 128, False, 4, 3),
        "not swapped": Tile(math.inf, 16, 64, False, 4, 6),
        "computed twice": Tile(math.inf, 64, 128, False, 4, 4, persistent=1, specialised=True),
        "not specialised": Tile(math.inf, 128, 128, False, 8, 4, persistent=1, specialised=True),
    }
    for name, tile in tiles.items():
        yield replace(gemm_configuration("fp8_gemm", "sm_90", tile), name=name)
    few = next(c for c in configurations(attention) if c.name.startswith("decode sm_90 bf16 16 heads 16x64"))
    yield replace(few, name="attention not swapped", constexprs=few.constexprs | {"SWAP": False})


def main(*names: str) -> None:
    chosen = (c for c in (*controls(), *configurations()) if not names or c.name in names)
    json.dump({c.name: report(compile_(c)) for c in chosen}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
