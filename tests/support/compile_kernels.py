"""Compiles kernel configurations without a GPU, and records what comes out, for tests/ops/test_compile.py.

    python tests/support/compile_kernels.py --save         after a change of a kernel, a tile or a configuration:
                                                           compiles what changed, into compiled_kernels.json
    python tests/support/compile_kernels.py --save --all   compiles everything (7 minutes), after a change of Triton
    python tests/support/compile_kernels.py --warm 14 sm_90 compiles a target's into Triton's cache, 14 at a time, and
                                                           says how many were there
    python tests/support/compile_kernels.py [NAME…]        prints the key of every configuration that
                                                           kernel_configurations.py lists, and of controls, which must be
                                                           found wanting, and the reports of those named

A report is used again only while its key is the same: the hash of all that the compiler is given (`key`).
A program of its own, because Triton's interpreter, in which the other tests run, takes the place of the compiler.
"""

import hashlib
import inspect
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.compiler import ASTSource, make_backend
from triton.language import constexpr
from triton.runtime.jit import JITCallable

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ops.gpu import attention
from ops.gpu.tiles import Tile
from support.kernel_configurations import Configuration, configurations, gemm_configuration

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RECORD = Path(__file__).parent / "compiled_kernels.json"
Report = dict[str, Any]
# How the names of the variables begin that Triton, LLVM and ptxas heed; and those that change nothing that is compiled.
HEEDED = ("TRITON_", "PTXAS_", "NVPTX_", "AMDGCN_", "LLVM_", "MLIR_", "DISABLE_", "ALLOW_", "USE_IR_LOC")
UNHEEDED = {"TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_ALWAYS_COMPILE", "TRITON_INTERPRET"}


def source_of(c: Configuration) -> tuple[ASTSource, GPUTarget]:
    """What a launch would have compiled: all pointers and sizes it may look at (not M) are multiples of 16."""
    assert isinstance(c.kernel, JITCallable), "these are the interpreter's kernels"
    names = c.kernel.arg_names
    assert set(names) == set(c.types) | set(c.constexprs), (c.name, names)
    unseen = {p.name for p in c.kernel.params if p.do_not_specialize}
    aligned = {n for n, t in c.types.items() if (t == "i32" or t.startswith("*")) and n not in unseen}
    amd = c.target.startswith("gfx")
    target = GPUTarget("hip", c.target, 64) if amd else GPUTarget("cuda", int(c.target.removeprefix("sm_")), 32)
    # The JIT's own function puts these in the form and the order that its cache's keys are made of.
    specialised = [(c.types.get(n, "constexpr"), "D" if n in aligned else None) for n in names]
    values = {n: c.constexprs.get(n) for n in names}
    _, signature, constants, attrs = c.kernel._pack_args(
        make_backend(target), dict(c.options), values, specialised, None
    )
    return ASTSource(c.kernel, signature, constants, attrs), target


def compile_(c: Configuration) -> Any:
    source, target = source_of(c)
    return triton.compile(source, target=target, options=c.options)


def key(c: Configuration) -> str:
    """A hash of everything that the report of a configuration follows from: the text of the kernel and of what it calls,
    the constants they read, types, alignment, constexprs, options, the target, Triton, ptxas, the environment, and how it is compiled and reported here.

    Triton's own key of a kernel is no use here: it changes with the number of the kernel's first line, and leaves out
    constants that are read through a module or as a parameter's default."""
    source, target = source_of(c)
    backend = make_backend(target)
    options = dict(vars(backend.parse_options(dict(c.options))))
    options["extern_libs"] = [(name, _digest(Path(path).read_bytes())) for name, path in options["extern_libs"]]
    given = (
        *(triton.__version__, backend.hash(), sorted(options.items())),
        *(_read_by(c.kernel, *c.constexprs.values()), c.kernel.arg_names),
        *(
            list(source.signature.items()),
            sorted(source.constants.items()),
            sorted(i for i in source.attrs.items() if i[1]),
        ),
        _heeded(),
        [inspect.getsource(function) for function in (source_of, compile_, report, _run)],
    )
    return _digest(repr(given).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _read_by(*values: Any) -> list[tuple[str, str | int]]:
    """Text, with decorators, of the kernels among values and of all they may call, and the constants that these may read:
    whatever their text names, be it in a comment. What is Triton's own is as its version says."""
    functions = [value for value in values if isinstance(value, JITCallable)]
    found: list[tuple[str, str | int]] = []
    for function in functions:  # grows by those called
        if _is_library(function.__module__):
            continue
        text = "".join(function.raw_src)
        found.append(("text", text))
        scopes = [function.get_capture_scope()]
        for scope in scopes:  # grows by the modules that a dot leads to
            for name in sorted(set(re.findall(r"\w+", text))):
                value = scope.get(name)
                if isinstance(value, JITCallable):
                    if not any(value is known for known in functions):
                        functions.append(value)
                    found.append((name, next(i for i, known in enumerate(functions) if known is value)))
                elif isinstance(value, ModuleType):
                    if not _is_library(value.__name__) and not any(vars(value) is known for known in scopes):
                        scopes.append(vars(value))
                elif isinstance(value, constexpr) or not (value is None or callable(value)):
                    found.append((name, repr(value)))
    return found


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names | {"triton", "torch"}


def report(compiled: Any) -> Report:
    """Registers a thread, bytes of stack (spills are there), bytes of shared memory, the names of the instructions, and
    whether a product or a cast takes subnormal numbers for zeros; warps, and the shapes that groups of warps multiply;
    and a hash of the code, instruction by instruction."""
    found = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    products = r"warp_group_dot .*-> tensor<(\d+)x(\d+)xf32"
    found["products"] = [[int(m), int(n)] for m, n in re.findall(products, compiled.asm["ttgir"])]
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        number = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
        found["registers"] = number["vgpr_count"]
        found["stack"] = number["private_segment_fixed_size"] + number["vgpr_spill_count"] + number["sgpr_spill_count"]
        found["flushes"] = not re.search(r"\.amdhsa_float_denorm_mode_32 3\b", code)
        found["instructions"] = sorted(set(re.findall(r"^\s+([a-z]\w+)", code, re.MULTILINE)))
        found["code"] = _digest("\n".join(re.findall(r"^\s+([a-z]\w+[^;\n]*)", code, re.MULTILINE)).encode())
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
    found["instructions"] = sorted(
        set(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code, re.MULTILINE))
    )
    found["code"] = _digest("\n".join(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*;)", code, re.MULTILINE)).encode())
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
    few = next(c for c in configurations(attention) if c.name == "decode sm_90 bf16 16 heads 16x64 descriptor")
    yield replace(few, name="attention not swapped", constexprs=few.constexprs | {"SWAP": False})


def toolchain() -> str:
    """What compiles here, for people; `key` has it in full."""
    ptxas = " and ".join(re.findall(r"\bV([\d.]+)", get_ptxas_version(90) + get_ptxas_version(100)))
    return ", ".join([f"Triton {triton.__version__}, ptxas {ptxas} on {platform.machine()}", *map("=".join, _heeded())])


def _heeded() -> list[tuple[str, str]]:
    return sorted((n, v) for n, v in os.environ.items() if n.startswith(HEEDED) and n not in UNHEEDED)


def read_toolchain() -> str:
    """What compiled the reports of RECORD."""
    return json.loads(RECORD.read_text())["toolchain"]


def read_record() -> dict[str, Report]:
    """The reports of RECORD, each with its key, by configuration name."""
    return json.loads(RECORD.read_text())["reports"]


def save(keep: bool) -> None:
    """Compiles what is not in RECORD under its present key, or everything, and writes it there, each at once."""
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    old = read_record() if keep and RECORD.exists() else {}
    everything = {c.name: (c, key(c)) for c in (*controls(), *configurations())}
    reports = {name: old[name] for name, (_, now) in everything.items() if old.get(name, {}).get("key") == now}
    write_record(reports)
    for name in [name for name in everything if name not in reports]:
        c, now = everything[name]
        reports[name] = {"key": now} | report(compile_(c))
        print(name, *(f"{what} {reports[name][what]}" for what in ("registers", "stack", "shared")), flush=True)
        write_record({name: reports[name] for name in everything if name in reports})


def write_record(reports: dict[str, Report]) -> None:
    """A line to a configuration."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(report)}" for name, report in reports.items())
    RECORD.write_text(f'{{"toolchain": {json.dumps(toolchain())}, "reports": {{\n{lines}\n}}}}\n')


def warm(processes: int, target: str, every: int = 1) -> dict[str, Any]:
    """Compiles a target's configurations, or every so-manieth, into Triton's cache, which the JIT reads; how many were
    there, and which failed."""
    names = [c.name for c in configurations() if c.target == target][::every]
    processes = min(processes, len(names))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(_warm, [names[i :: 4 * processes] for i in range(min(4 * processes, len(names)))]))
    failed = {name: error for part in parts for name, error in part[1].items()}
    return {"target": target, "configurations": len(names), "hits": sum(hits for hits, _ in parts), "failed": failed}


def _warm(names: list[str]) -> tuple[int, dict[str, str]]:
    hits: list[bool] = []
    failed: dict[str, str] = {}
    knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    for c in configurations():
        if c.name in names:
            try:
                compile_(c)
            except Exception as e:
                failed[c.name] = repr(e)[:200]
    return sum(hits), failed


def main(*arguments: str) -> None:
    if "--warm" in arguments:
        _, processes, target, *every = arguments
        print(json.dumps(warm(int(processes), target, int(every[1]) if every else 1)))
        return
    if "--save" in arguments:
        return save(keep="--all" not in arguments)
    found = {c.name: {"key": key(c)} | (report(compile_(c)) if c.name in arguments else {})
             for c in (*controls(), *configurations())}  # fmt: skip
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
