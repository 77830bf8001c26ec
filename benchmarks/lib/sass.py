"""Machine code as Triton's own nvdisasm prints it: its instructions and loops, and what a compiled kernel occupies."""

import re
import tempfile
from typing import Any, NamedTuple

REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 228 << 10, 64, 32  # of a multiprocessor, compute capability 9.0
RESERVED = 1 << 10  # bytes of shared memory that the driver takes for each program


class Loop(NamedTuple):
    instructions: int
    multiplies: bool  # on the tensor cores


def code_of(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions, and (first, last) of every loop, innermost or not."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            instructions.append(instruction[1])
    loops = []
    for end, line in enumerate(instructions):
        back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if back and labels.get(back[1], end + 1) < end:  # a branch to itself ends the code
            loops.append((labels[back[1]], end))
    return instructions, loops


def innermost(text: str) -> tuple[int, list[Loop]]:
    """How many instructions the code has, and its innermost loops: first those that multiply, in which others may lie
    (that wait for a barrier), then those apart from them; the shortest first."""
    instructions, loops = code_of(text)
    products = [i for i, line in enumerate(instructions) if re.search(r"\b[HQ]G?MMA", line)]
    multiplies = {(a, b): any(a <= i <= b for i in products) for a, b in loops}
    kept: list[tuple[int, int]] = []
    for a, b in sorted(multiplies, key=lambda loop: (not multiplies[loop], loop[1] - loop[0])):
        if all(b < c or d < a for c, d in kept):
            kept.append((a, b))
    found = [Loop(b - a + 1, multiplies[a, b]) for a, b in kept]
    return sum(not line.startswith("NOP") for line in instructions), found


def inner_loops(text: str) -> list[int]:
    """The instructions of each innermost loop that has a tensor core's instruction."""
    return [loop.instructions for loop in innermost(text)[1] if loop.multiplies]


def programs_that_fit(registers: int, warps: int, shared: int) -> int:
    """On one multiprocessor at a time. Registers are given out by eight a thread."""
    by_registers = REGISTERS // (8 * -(-registers // 8) * 32 * warps)
    return min(by_registers, SHARED // (shared + RESERVED), WARPS // warps, PROGRAMS)


def counts(compiled: Any) -> dict[str, Any]:
    """Of a kernel that Triton has compiled for an Nvidia GPU."""
    from support.compile_kernels import _run  # type: ignore[import-not-found]

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, text = _run("cuobjdump", "--dump-resource-usage", file.name), _run("nvdisasm", "-c", file.name)
    number = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    instructions, loops = innermost(text)
    return {
        "registers": number["REG"], "stack": number["STACK"] + number["LOCAL"], "shared": shared, "warps": warps,
        "instructions": instructions, "loops": [list(loop) for loop in loops],
        "fit": programs_that_fit(number["REG"], warps, shared),
    }  # fmt: skip
