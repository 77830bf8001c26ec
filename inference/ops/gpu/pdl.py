"""Programmatic dependent launch (compute capability 9.0 and later): a kernel is brought onto the multiprocessors while
the one before it in the stream still runs, and waits there. That hides most of what a launch costs in a chain of short
kernels.

A kernel launched with `options` calls `wait_for_previous` before it reads what another kernel wrote and before it
writes anything. Until then it may compute what depends on constants, weights, and results of kernels before the
previous one, which has waited for those before it let this one start. Elsewhere, and in the interpreter, it is nothing.
"""

from typing import Any

import triton
from triton.language import core

from ops.gpu.casts import INTERPRETED

ARCHITECTURES = ("sm_90", "sm_100")


@core.extern
def _grid_dependency(_semantic: Any = None) -> None:
    """The two instructions of PTX where the compilation is for a dependent launch. (tl.extra.cuda has each alone; what
    they are compiled for, only the compiler's options tell.)"""
    options = _semantic.builder.options
    if getattr(options, "launch_pdl", False):
        for instruction in ("wait", "launch_dependents"):
            core.inline_asm_elementwise(
                f"griddepcontrol.{instruction}; // $0", "=r", [], dtype=core.int32, is_pure=False, pack=1,
                _semantic=_semantic,
            )  # fmt: skip


@triton.jit
def wait_for_previous():
    """Until the kernel before this one has finished, and its results are visible; then lets the next one start."""
    if not INTERPRETED:
        _grid_dependency()


def options(arch: str) -> dict[str, bool]:
    """What a launch of a kernel that calls wait_for_previous is given, for a row of the tables."""
    return {"launch_pdl": True} if arch in ARCHITECTURES else {}
