"""The CPU's ops in C: compiles kernels.c when it is first needed, and wraps each of its functions for tensors.

They take bfloat16, sum in float32 and round once, at the end. A test holds every one to its reference. Without a C
compiler `library` returns None, and CpuBackend serves in place of CompiledCpuBackend.

C does what torch's own ops cannot: from the same packed weights it multiplies few rows at the memory's speed and many
at the processor's, and it computes a layer in a dozen calls instead of two hundred.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from core.batch import Batch
from core.numerics import Form
from ops import reference
from ops.cpu.attention import lengths_of
from ops.cpu.captured_calls import active_capture
from ops.formats import Routing, Weight

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
NATIVE = ("-march=native", "-mcpu=native", "")  # some compilers for ARM know the second, some neither
CHUNK_BYTES = 3 << 18  # of a product's float32 input, which stays in a core's cache with a panel of weights
TILE_CHUNK_BYTES = 1 << 20  # of it in bfloat16, where the matrix unit multiplies
BUNDLE_ROWS = 256  # rows of the experts that are computed together
ABSORBED_ROWS = 16  # of a sequence, which attend in the latent space whatever its length: a recorded step has no more
UNDEFINED = ("-Wl,-z,undefs",)  # OpenMP's functions, which torch has brought into the process
COMPILER_SECONDS = 120.0  # after which a compiler, which takes ten, is given up
INSTALL = "pip install ziglang==0.17.1, apt install gcc libc6-dev, dnf install gcc or apk add gcc musl-dev brings one"

# --------------------------------------------------------------------------------------------------------------------
# The library
# --------------------------------------------------------------------------------------------------------------------


def library() -> Any | None:
    """The compiled kernels, or None for the reason that why_not gives."""
    return _attempt()[0]


def serve(dtype: torch.dtype) -> bool:
    """Whether these kernels compute a model with activations of this dtype: bfloat16, where they are compiled."""
    return dtype == torch.bfloat16 and library() is not None


def _kernels() -> Any:
    """The compiled kernels, which must exist. While a forward is captured so are their calls."""
    found = library()
    assert found is not None, why_not()
    return found if active_capture() is None else found.captured


def why_not() -> str:
    """Why there are no compiled kernels; empty if there are some."""
    return _attempt()[1]


@functools.cache
def _attempt() -> tuple[Any | None, str]:
    if sys.byteorder != "little" or "libgomp" not in _mapped():
        return None, "the C kernels need Linux on a little-endian processor, and GNU OpenMP in torch"
    try:
        _cache()
        commands = compilers()
    except OSError as error:
        return None, f"there is no folder to compile C kernels in: {error}"
    except ValueError as error:
        return None, f"no C compiler that works: CC is {os.environ['CC']!r} ({error})"
    if not commands:
        return None, f"there is no C compiler; {INSTALL}"
    reason = ""
    for command, native in itertools.product(commands, NATIVE):
        flags = tuple(native if flag == NATIVE[0] else flag for flag in FLAGS if native or flag != NATIVE[0])
        try:
            found = load(build(command, flags))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            said = getattr(error, "stderr", None) or str(error)
            if isinstance(error, subprocess.TimeoutExpired):
                said = f"{shlex.join(command)} timed out after {COMPILER_SECONDS:g} seconds"
            said = " ".join(said.split())
            reason = reason or f"no C compiler that works: {said[-200:]}; {INSTALL}"
            if isinstance(error, subprocess.TimeoutExpired):
                break  # another try might take as long
            continue
        if "libomp" in _mapped():
            return None, "the compiler's threads are not those of GNU OpenMP"
        return found, ""
    return None, reason


def _mapped() -> str:
    """The files that this process has in its memory, as Linux lists them; empty elsewhere."""
    maps = Path("/proc/self/maps")
    return maps.read_text(errors="replace") if maps.exists() else ""


def load(made: Path) -> Any:
    """Opens a library that `build` made and gives each function the types that the source declares."""
    found: Any = ctypes.CDLL(str(made))
    found.captured = SimpleNamespace()  # the same functions, whose calls the active capture takes
    for result, name, arguments in re.findall(r"^(void|int64_t) (\w+)\(([^)]*)\) \{", _source(), re.MULTILINE):
        function = getattr(found, name)
        function.restype = {"void": None, "int64_t": ctypes.c_int64}[result]
        function.argtypes = [_argument(" ".join(a.split())) for a in arguments.split(",") if a != "void"]
        if result == "void":
            unchecked = found[name]  # takes arguments that are converted
            unchecked.restype = None
            setattr(found.captured, name, partial(_capture, unchecked, function.argtypes))
        else:
            setattr(found.captured, name, function)
    return found


def _capture(function: Any, argtypes: list[Any], *args: Any) -> None:
    capture = active_capture()
    assert capture is not None
    capture.call(function, argtypes, args)


def _scratch(floats: int, numbers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """So many float32 and int64 for one call to work in."""
    first = -(-floats // 16) * 16  # whole cache lines
    nbytes, capture = 4 * first + 8 * numbers, active_capture()
    held = torch.empty(nbytes, dtype=torch.uint8) if capture is None else capture.scratch.take(nbytes)
    return held[: 4 * floats].view(torch.float32), held[4 * first :].view(torch.int64)


def _source() -> str:
    return SOURCE.read_text(encoding="utf-8")


def compilers() -> list[list[str]]:
    """Commands to try: $CC if that is set, else those of cc, gcc and clang that exist, and Clang as the Python package
    ziglang has it."""
    if asked := shlex.split(os.environ.get("CC", "")):
        return [asked]
    found = [[path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    return [*found, [sys.executable, "-m", "ziglang", "cc"]] if importlib.util.find_spec("ziglang") else found


def build(command: list[str], flags: tuple[str, ...]) -> Path:
    """The library's file. Compiles the source unless the cache has it for this processor, compiler and these flags.

    Intel's instruction for pairs of bfloat16 takes four times as long as that for pairs of whole numbers, and twice as
    long as the same products of floats. AMD's takes as long as whole numbers (iree-org/iree#15089).

    Raises OSError, subprocess.SubprocessError or, for a command that is none, ValueError if it cannot be made.
    """
    kind = [line for line in _processor() if line.split("\t")[0].strip() in ("flags", "Features", "model name")]
    if "vendor_id\t: GenuineIntel" in _processor():
        flags = ("-DSLOW_PAIRS", *flags)
    folder = _cache()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return _build(command, flags, folder, scratch, kind)


def _processor() -> list[str]:
    """What Linux says of the first one, a line each."""
    return Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()


def _build(command: list[str], flags: tuple[str, ...], folder: Path, scratch: str, kind: list[str]) -> Path:
    version = _run([*command, "--version"], scratch)
    if "clang" in version:  # left alone it would bring LLVM's threads beside GNU's: see clang_openmp.h
        flags = tuple(flag for given in flags for flag in (["-Xclang"] if given == "-fopenmp" else []) + [given])
    texts = [_source(), SOURCE.with_name("clang_openmp.h").read_text(encoding="utf-8"), version]
    key = hashlib.sha256("\n".join([*texts, *command, *flags, *kind]).encode()).hexdigest()[:16]
    made = folder / f"kernel_cpu-{key}.so"
    if not made.exists():
        fresh = Path(scratch) / made.name
        _run([*command, *flags, str(SOURCE), "-o", str(fresh), "-lm", *UNDEFINED], scratch)
        os.replace(fresh, made)  # atomic: other ranks may compile it too
    return made


def _run(command: list[str], scratch: str) -> str:
    """What a command prints; `scratch` is where Zig may keep files. Raises OSError, or subprocess.SubprocessError where
    it fails or takes too long."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    variables = os.environ | {"ZIG_GLOBAL_CACHE_DIR": scratch, "ZIG_LOCAL_CACHE_DIR": scratch}
    with subprocess.Popen(
        command, encoding="utf-8", errors="replace", env=variables, start_new_session=True, **pipes
    ) as process:
        try:
            out, err = process.communicate(timeout=COMPILER_SECONDS)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started holds the pipes too
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out


def _cache() -> Path:
    """A directory that only this user can write to: the user's cache, or a temporary one of this process."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek-v3-inference"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    return Path(_own_folder().name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory that is removed when the process ends."""
    return tempfile.TemporaryDirectory()


def _argument(declared: str) -> Any:
    """The ctypes type of an argument as C declares it."""
    if declared.startswith("const Matrix"):
        return ctypes.POINTER(Matrix)
    if "*" not in declared:
        return {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float}[declared.split()[-2]]
    dtype = {
        "bf16": torch.bfloat16, "float": torch.float32, "int64_t": torch.int64, "int32_t": torch.int32, "void": None
    }[declared.removeprefix("const ").split()[0]]  # fmt: skip
    return _pointer(dtype)


@functools.cache
def _pointer(dtype: torch.dtype | None) -> Any:
    """The ctypes type of a pointer to a tensor of this dtype (None: of any), or to nothing."""
    address = ctypes.c_void_p

    class Pointer:
        @staticmethod
        def from_param(t: torch.Tensor | None) -> ctypes.c_void_p:
            if t is None:
                return address()
            assert t.is_cpu and (t.dtype is dtype or dtype is None), f"{t.dtype} where C takes {dtype}"
            return address(t.data_ptr())

    return Pointer


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, with stride 1 in its last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _threads(work: int) -> int:
    """Threads for `work` numbers: one if there are few, since waking the others takes some microseconds."""
    return torch.get_num_threads() if work > 1 << 13 else 1


# --------------------------------------------------------------------------------------------------------------------
# Weights and their products
# --------------------------------------------------------------------------------------------------------------------


class Matrix(ctypes.Structure):
    """A packed weight as C has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("n", "k", "form", "rows", "block", "bf16_scales", "has_nan")),
        *((name, ctypes.c_int64) for name in ("stack_data", "stack_scales", "stack_zeros")),
    ]


FORMS = {torch.bfloat16: 0, torch.float8_e4m3fn: 1, torch.int8: 2, torch.uint8: 3}  # C's numbers of them


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight (N, K), or a stack of them (E, N, K), in panels of rows: (…, panels, even K, panel width), bfloat16 or,
    of 8 bits, uint8; INT4's are uint8 (…, panels, K / 2, panel width).

    Scales, float32 or bfloat16, are as they were, (…, ceil(N / rows), ceil(K / columns)), where panels share them; each
    row's own, and zero points, are lines of a panel's rows, (…, panels, ceil(K / columns), panel width).
    """

    data: torch.Tensor
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16  # of what was packed
    scale: torch.Tensor | None = None
    block: tuple[int, int] = (1, 1)  # rows and columns that share a scale
    zero: torch.Tensor | None = None
    has_nan: bool = False  # whether a number of FP8 is NaN
    matrix: Matrix = field(init=False, repr=False, compare=False)  # for C, which may use it as long as this exists

    def __post_init__(self) -> None:
        tensors = self.data, self.scale, self.zero
        strides = (t.stride(0) * t.element_size() if t is not None and self.is_stack else 0 for t in tensors)
        half = self.scale is not None and self.scale.dtype == torch.bfloat16
        addresses = (None if t is None else t.data_ptr() for t in tensors)
        matrix = Matrix(*addresses, self.n, self.k, FORMS[self.dtype], *self.block, half, self.has_nan, *strides)
        object.__setattr__(self, "matrix", matrix)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, e: int) -> "Packed":
        scale, zero = (None if t is None else t[e] for t in (self.scale, self.zero))
        return replace(self, data=self.data[e], scale=scale, zero=zero)

    @property
    def is_stack(self) -> bool:
        return self.data.dim() == 4


def panel_width() -> int:
    return _kernels().panel_width()


def packed_numbers(n: int, k: int) -> int:
    """How many numbers a packed (N, K) weight has, with its padding."""
    width = panel_width()
    return -(-n // width) * width * _even(k)


def packed_bytes(form: Form, n: int, k: int) -> int:
    """What a weight (N, K) of this form takes packed, with its scales, zero points and padding. One that is plain is
    bfloat16."""
    if not form.is_quantised:
        return 2 * packed_numbers(n, k)
    rows, columns = form.block
    width, blocks = panel_width(), math.ceil(k / columns)
    n_scales = (math.ceil(n / width) * width if rows == 1 else math.ceil(n / rows)) * blocks
    of_scale = (2 if form.scale == torch.bfloat16 else 4) + form.zeros
    return packed_numbers(n, k) // form.packing + n_scales * of_scale


def is_packed_in_place(n: int, k: int) -> bool:
    """Whether a stack of weights (N, K) is packed where it lies: packed, it has as many numbers."""
    return packed_numbers(n, k) == n * k


def _even(k: int) -> int:
    return k + k % 2


def packs(w: Weight) -> bool:
    """Whether `pack` takes a weight of this form: any of Form's whose blocks are of single rows or whole panels."""
    if w.scale is None:
        return w.data.dtype == torch.bfloat16
    rows, columns = w.block
    if w.data.dtype == torch.uint8:
        return rows == 1 and columns % 4 == 0 and 2 * w.data.shape[-1] % columns == 0
    return w.data.dtype in FORMS and columns % 2 == 0 and (rows == 1 or rows % panel_width() == 0)


def use_huge_pages(memory: torch.Tensor) -> None:
    _kernels().use_huge_pages(memory, memory.nbytes)


def pack(w: torch.Tensor) -> Packed:
    """Packs bfloat16 w (N, K) or (E, N, K). A stack is packed in place where that is possible, which destroys w."""
    return pack_weight(Weight(w))


def pack_weight(w: Weight) -> Packed:
    """Packs a weight that `packs` accepts, (N, K) or (E, N, K). A stack is packed in place where that is possible,
    which destroys it."""
    data, form = w.data.contiguous(), FORMS[w.data.dtype]
    width, packing = panel_width(), 2 if w.data.dtype == torch.uint8 else 1
    n, k = data.shape[-2], data.shape[-1] * packing
    held = data if data.dtype == torch.bfloat16 else data.view(torch.uint8)
    shape = (*data.shape[:-2], -(-n // width), _even(k) // packing, width)
    is_stack = data.dim() == 3
    in_place = is_stack and is_packed_in_place(n, k)
    out = held.view(shape) if in_place else held.new_empty(shape)
    use_huge_pages(out)
    threads = torch.get_num_threads()
    scratch = held.new_empty(threads, _even(k) // packing * width)
    has_nan = False
    for one, to in zip(held, out, strict=True) if is_stack else [(held, out)]:
        has_nan |= bool(_kernels().pack(one, n, k, form, to, scratch, threads))
    if w.scale is None:
        return Packed(out, n, k)
    scale = w.scale if w.scale.dtype in (torch.bfloat16, torch.float32) else w.scale.float()
    if w.block[0] == 1:
        zero = None if w.zero is None else _in_lines(w.zero, in_place)
        return Packed(out, n, k, w.data.dtype, _in_lines(scale, in_place), w.block, zero, has_nan)
    return Packed(out, n, k, w.data.dtype, scale.contiguous(), w.block, has_nan=has_nan)


def _in_lines(s: torch.Tensor, in_place: bool) -> torch.Tensor:
    """Scales or zero points of rows (…, N, blocks) as lines of panels: (…, panels, blocks, panel width). `in_place`:
    those of a stack whose N is whole panels, where they lie, an expert at a time. A copy of each stack would be freed
    among other tensors, and the allocator keeps such memory."""
    width = panel_width()
    if in_place:
        s = s.contiguous()
        for one in s:
            lines = one.unflatten(0, (-1, width)).mT.clone(memory_format=torch.contiguous_format)
            one.view(lines.shape).copy_(lines)
        return s.view(len(s), *lines.shape)
    filled = F.pad(s, (0, 0, 0, -s.shape[-2] % width))
    return filled.unflatten(-2, (-1, width)).mT.contiguous()


def may_use_tiles() -> bool:
    """Whether this processor has a matrix unit (AMX) that the kernels were compiled for and this process may use."""
    return bool(_kernels().may_use_tiles())


def may_use_pairs() -> bool:
    """Whether the kernels were compiled for instructions that add up products of bfloat16 (AVX512_BF16, where fast)."""
    return bool(_kernels().may_use_pairs())


def may_use_fixed() -> bool:
    """Whether rows may be multiplied in fixed point (reference.fixed_point) by weights of 8 or 4 bits: where neither
    tiles nor pairs may be used, and there are products of 16-bit whole numbers (AVX2, AVX-VNNI or AVX512_VNNI)."""
    return library() is not None and bool(_kernels().may_use_fixed())


def may_use_units(fixed_point: bool = False) -> bool:
    """Whether the kernels may multiply bfloat16 in units that this processor has for it, or in fixed point."""
    return may_use_tiles() or may_use_pairs() or (fixed_point and may_use_fixed())


def linear(x: torch.Tensor, w: Packed, dtype: torch.dtype, units: bool = False) -> torch.Tensor:
    """x (T, K), bfloat16 or float32, by w (N, K), in one of these dtypes: (T, N). `units`: bfloat16 rows go through the
    processor's units for them, which add up in another order: its matrix unit, if they are enough for it, or its
    instructions for pairs; or, if it uses neither, more than a few by a quantised w in fixed point (may_use_fixed)."""
    x, (t, k) = _rows(x), x.shape
    assert k == w.k and not w.is_stack, (x.shape, w.data.shape)
    assert {x.dtype, dtype} <= {torch.bfloat16, torch.float32}, (x.dtype, dtype)
    out = x.new_empty(t, w.n, dtype=dtype)
    units = units and x.dtype == torch.bfloat16
    pairs = units and may_use_pairs()
    fixed = units and may_use_fixed() and w.dtype != torch.bfloat16
    chunk = tile_chunk_rows(k) if units and may_use_tiles() else chunk_rows(k, pairs or fixed)
    scratch = _scratch(min(t, chunk) * _even(k) // (2 if pairs else 1))[0]
    flags = x.dtype == torch.float32, dtype == torch.float32
    threads = _threads(w.n * k)
    _kernels().linear(x, flags[0], t, x.stride(0), w.matrix, out, flags[1], scratch, chunk, units, threads)
    return out


def chunk_rows(k: int, pairs: bool = False) -> int:
    """How many rows of K channels a product takes at a time: a multiple of every processor's row block. Pairs are of
    bfloat16, or in fixed point."""
    return max(1, CHUNK_BYTES // ((2 if pairs else 4) * k) // 12) * 12


def tile_chunk_rows(k: int) -> int:
    """The same where the matrix unit may multiply: a multiple of two tiles, and of every processor's row block."""
    return max(1, TILE_CHUNK_BYTES // (2 * k) // 96) * 96


def silu_mul(gate_up: torch.Tensor, inter: int) -> torch.Tensor:
    """As reference.silu_mul."""
    t, both = gate_up.shape
    assert both % 2 == 0 and inter <= both // 2, (gate_up.shape, inter)
    out = gate_up.new_empty(t, inter)
    _kernels().silu_mul(gate_up.contiguous(), t, both // 2, inter, out, _threads(t * inter))
    return out


# --------------------------------------------------------------------------------------------------------------------
# Mixture of experts
# --------------------------------------------------------------------------------------------------------------------


def route(logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.route; of equal scores the lowest id is chosen."""
    t, e = logits.shape
    assert e >= rule.top_k
    weights = logits.new_empty(t, rule.top_k)
    ids = torch.empty(t, rule.top_k, dtype=torch.int64)
    groups = 1 if rule.topk_method == "greedy" else rule.n_groups
    threads = _threads(t * e)
    scratch, _ = _scratch(threads * (2 * e + groups))
    _kernels().route(
        logits.contiguous(), t, e, bias, rule.score_func == "sigmoid", groups, rule.n_limited_groups,
        rule.topk_method == "noaux_tc", rule.top_k, rule.normalise, rule.route_scale, weights, ids, scratch, threads,
    )  # fmt: skip
    return weights, ids


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    w13: Packed,
    w2: Packed,
    inter: int,
    shared: torch.Tensor | None = None,
    units: bool = False,
) -> torch.Tensor:
    """As reference.experts on packed weights, plus `shared` (T, H): (T, H) in x's dtype, rounded once, at the end.
    w13's halves, gate and up, may end in filling. `units`: as in `linear`, of an expert's rows; what SwiGLU makes of
    those is rounded too."""
    x, (t, h), top = _rows(x), x.shape, ids.shape[1]
    assert w13.n % 2 == 0 and w13.n >= 2 * inter and w13.k == w2.n == h, (w13.n, w13.k, inter, w2.n, h)
    assert w13.is_stack and w2.is_stack and len(w13) == len(w2) and w2.k == inter, (w13.data.shape, w2.data.shape)
    out = torch.empty(t, h, dtype=x.dtype)
    floats = bundle_rows(t, top) * (_even(h) + w13.n + _even(inter))
    scratch, numbers = _scratch(t * h + floats, t * top + len(w13) + 1)
    sums, scratch = scratch.split([t * h, floats])
    shared = None if shared is None else shared.contiguous()
    _kernels().experts(
        x, t, x.stride(0), h, ids.contiguous(), weights.contiguous(), top, first, len(w13), w13.matrix, w2.matrix,
        shared, out, BUNDLE_ROWS, sums, scratch, numbers, units, torch.get_num_threads(),
    )  # fmt: skip
    return out


def bundle_rows(t: int, top: int) -> int:
    """The most rows of a group of experts that are computed together."""
    return min(t * top, max(t, BUNDLE_ROWS))


# --------------------------------------------------------------------------------------------------------------------
# Norms, and what the cache holds
# --------------------------------------------------------------------------------------------------------------------


def norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, delta: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.norm: RMSNorm of x (T, H) + delta, and that sum."""
    x, (t, h) = _rows(x), x.shape
    y = x.new_empty(t, h)
    total = x if delta is None else x.new_empty(t, h)
    delta = None if delta is None else delta.contiguous()
    total_or_none = None if delta is None else total
    _kernels().norm(x, t, x.stride(0), h, delta, weight, eps, y, total_or_none, _threads(t * h))
    return y, total


def write_latents(
    kv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    latents: torch.Tensor,
) -> None:
    """The latents of reference.norm_latents, into bfloat16 ones."""
    (t, width), c, r = kv.shape, len(weight), 2 * cos.shape[1]
    kv = _rows(kv)
    assert latents.is_contiguous() and latents.shape[-1] == width == c + r
    _kernels().write_latents(
        kv, t, kv.stride(0), c, r, weight, eps, cos.contiguous(), sin.contiguous(), slots.contiguous(), latents,
        _threads(t * width),
    )  # fmt: skip


def rotary(q_pe: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As reference.rotary, of bfloat16 q_pe (T, N, R)."""
    t, n, r = q_pe.shape
    q_pe, out = _rows(q_pe), q_pe.new_empty(t, n, r)
    _kernels().rotary(
        q_pe, t, n, r, q_pe.stride(0), q_pe.stride(1), cos.contiguous(), sin.contiguous(), out, _threads(t * n * r)
    )
    return out


# --------------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------------


def absorbed_rows(most: int, keys: int) -> int:
    """Query rows of a sequence up to which mla is faster than mla_prefill, over so many keys, the most in a batch.
    `most`: reference.absorbed_rows, which counts what is done for each key, and is ALWAYS where that never takes more.
    A row's query and result are absorbed too, as much work as expanding a key."""
    return most if most >= reference.ALWAYS else max(most * keys // (most + keys), ABSORBED_ROWS)


def mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
    most: int,
    out: torch.Tensor,
) -> None:
    """As reference.mla, absorbed, for sequences with at most `most` query rows: fills their rows of out (T, N, dv)."""
    found, (n, dn, c), dv, r = _kernels(), w_uk.shape, w_uv.shape[1], q_pe.shape[-1]
    assert latents.is_contiguous() and out.is_contiguous() and latents.shape[-1] == c + r
    q_nope, q_pe, threads = _rows(q_nope), q_pe.contiguous(), torch.get_num_threads()
    lengths = batch.cu_seqlens_q, batch.kv_lens
    shape = "mla", most, n, c, r, threads, len(out)
    if shape not in batch.memo:  # all layers' are the same
        numbers = torch.empty(found.mla_numbers(len(batch.kv_lens), len(out)), dtype=torch.int64)
        ends = batch.kv_lens if active_capture() is None else torch.full_like(batch.kv_lens, batch.whole.longest_kv)
        size = found.mla_floats(lengths[0], ends, len(batch.kv_lens), most, n, c, r, threads, numbers)
        batch.memo[shape] = size, len(numbers)
    scratch, numbers = _scratch(*batch.memo[shape])
    found.mla(
        q_nope, q_nope.stride(0), q_nope.stride(1), q_pe, latents, latents.shape[1], batch.pages.contiguous(),
        batch.pages.shape[1], *lengths, batch.positions, len(batch.kv_lens), most, n, dn, r, c, dv, w_uk, w_uv, scale,
        out, numbers, scratch, threads,
    )  # fmt: skip


def mla_prefill(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latents: torch.Tensor,
    batch: Batch,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
    most: int,
    out: torch.Tensor,
    units: bool = False,
) -> None:
    """As reference.mla, expanded, for sequences with more than `most` query rows: fills their rows of out (T, N, dv).
    `units`: as in `linear`; the softmax's weights are rounded too."""
    found, (n, dn, c), dv, r = _kernels(), w_uk.shape, w_uv.shape[1], q_pe.shape[-1]
    assert latents.is_contiguous() and out.is_contiguous() and latents.shape[-1] == c + r
    q_nope, q_pe, pages, threads = _rows(q_nope), q_pe.contiguous(), batch.pages.contiguous(), torch.get_num_threads()
    if batch.whole.longest_q <= most:
        return
    bounds, lengths = lengths_of(batch)
    for b, length in enumerate(lengths):
        first, count = bounds[b], bounds[b + 1] - bounds[b]
        if count > most:
            size = found.prefill_bytes(count, length, n, dn, r, c, dv, units, threads)
            found.mla_prefill(
                q_nope[first:], q_nope.stride(0), q_nope.stride(1), q_pe[first:], latents, latents.shape[1], pages[b],
                length, batch.positions[first:], count, n, dn, r, c, dv, w_uk, w_uv, scale, out[first:],
                torch.empty(size, dtype=torch.uint8), units, threads,
            )  # fmt: skip
