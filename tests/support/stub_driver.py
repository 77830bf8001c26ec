"""A GPU of compute capability 9.0 that is not there: Triton's own path of a launch, up to the driver, which writes it down.

    with stub_driver.installed() as gpu:                  # launches are noted, and nothing is compiled
        step()
    print([launch.name for launch in gpu.launches])

    with stub_driver.installed(compiles=True) as gpu:     # compiled too, or taken from Triton's cache: gpu.hits

What is Triton's: the specialisation of arguments, the cache's keys, options, the compiler, limits of shared memory and
threads, the scratch memory that a kernel asks its allocator for, tensor descriptors. What is ours: the driver, whose
launch checks grid and arguments as the C launcher does and computes nothing. Operations of torch count as launches too,
views and allocations aside; with them the list is a step's, in order. Tensors are on "meta" (which has sizes and types
and no memory: a rank of the real model), on the stand-in device, or on the CPU.

A process that imports this must not have TRITON_INTERPRET set. Works with Triton 3.6.0 and 3.7.1.
"""

import hashlib
import math
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from triton import compiler, knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import driver as nvidia
from triton.compiler import make_backend
from triton.runtime import _allocation
from triton.runtime.cache import get_cache_key
from triton.runtime.driver import driver as drivers
from triton.runtime.jit import JITFunction

from ops.gpu import device as gpu_device
from ops.gpu import moe

TARGET = GPUTarget("cuda", 90, 32)
# An H200, as its driver describes it (CUDA programming guide, compute capability 9.0).
PROPERTIES = {
    "max_shared_mem": 227 << 10, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
    "sm_clock_rate": 1980000, "mem_clock_rate": 3201000, "mem_bus_width": 6144,
}  # fmt: skip
MAX_THREADS, MAX_GRID = 1024, (2**31 - 1, 65535, 65535)
INTEGERS = {"i1": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "u1": 8, "u8": 8, "u16": 16, "u32": 32, "u64": 64}
FLOATS = ("fp16", "bf16", "fp32", "f32", "fp64")
# Operations of torch that launch nothing though their results are new: allocations, and what only renames.
NO_LAUNCH = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh",
    "resize_", "set_", "is_pinned", "_pin_memory", "_local_scalar_dense",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel of ours, or an operation of torch, named "aten::…", of which the tensors alone are known."""

    name: str
    grid: tuple[int, int, int] = (1, 1, 1)
    arguments: dict[str, Any] = field(default_factory=dict)  # run-time ones by name; a tensor as its type and shape
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # num_warps, launch_pdl, …
    key: str = ""  # of the compilation in Triton's cache on disk
    stream: int = 0  # 1: the side stream

    @property
    def ours(self) -> bool:
        return not self.name.startswith("aten::")


class StubGpu:
    """What was launched, compiled and found in the cache."""

    def __init__(self, compiles: bool, notes: bool) -> None:
        self.compiles, self.notes = compiles, notes
        self.launches: list[Launch] = []
        self.compilations: dict[str, str] = {}  # by key in Triton's cache: the kernel's name
        self.sources: dict[str, tuple[Any, Any, Any]] = {}  # of those not compiled: what triton.compile would be given
        self.hits = 0  # compilations that the cache on disk had
        self.allocated = 0  # bytes of scratch memory that kernels asked for
        self.stream = 0

    def counts(self, stream: int | None = None) -> Counter[str]:
        """Launches by name, of one stream or of all."""
        return Counter(launch.name for launch in self.launches if stream in (None, launch.stream))

    def beside(self, work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        """moe.run_on_side_stream for this GPU: the second stream is a number."""
        before, self.stream = self.stream, 1
        result = work()
        self.stream = before
        return lambda: result


class StubDriver(DriverBase):
    """The driver that Triton asks for the device, its limits and a launcher."""

    def __init__(self, gpu: StubGpu) -> None:
        self.gpu = gpu
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: PROPERTIES,
            fill_tma_descriptor_tiled=check_descriptor,
        )  # fmt: skip
        self.launcher_cls = lambda src, metadata: Launcher(gpu, src, metadata)

    @staticmethod
    def _load(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert binary[:4] == b"\x7fELF", f"{name}: not a cubin"
        return "module", "function", 0, 0, MAX_THREADS

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        assert device == 0

    def get_current_stream(self, device: int) -> int:
        return self.gpu.stream

    def get_device_capability(self, device: object = None) -> tuple[int, int]:
        return 9, 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> Any:
        raise AssertionError("the stub has no time")


class Launcher:
    """A compiled kernel's launcher, with the arguments that Triton's CudaLauncher gets."""

    def __init__(self, gpu: StubGpu, src: Any, metadata: Any) -> None:
        self.gpu, self.src, self.metadata = gpu, src, metadata
        self.names = list(src.signature)
        self.types = list(src.signature.values())

    def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        if not self.gpu.notes:
            return
        arguments = rest[5:]  # after the function, its metadata and hooks
        grid = (x, y, z)
        if not all(isinstance(n, int) and n <= most for n, most in zip(grid, MAX_GRID, strict=True)):
            raise RuntimeError(f"{self.src.name}: no such grid as {grid}")
        if min(grid) < 1:  # Triton's launcher returns silently; a kernel of ours is not asked for nothing
            raise AssertionError(f"{self.src.name}: an empty grid {grid}")
        for size, align, allocator in (
            (self.metadata.global_scratch_size, self.metadata.global_scratch_align, _allocation._allocator),
            (self.metadata.profile_scratch_size, self.metadata.profile_scratch_align, _allocation._profile_allocator),
        ):
            if size:
                memory = allocator.get()(x * y * z * size, align, stream)
                assert memory.data_ptr() % align == 0, "scratch memory that is not aligned"
                self.gpu.allocated += x * y * z * size
        assert len(arguments) == len(self.types), "not the arguments of the signature"
        named = zip(self.names, self.types, arguments, strict=True)
        run_time = {n: packed_argument(n, ty, value, self.metadata) for n, ty, value in named if ty != "constexpr"}
        constants = {self.names[path[0]]: value for path, value in self.src.constants.items()}
        options = {n: getattr(self.metadata, n) for n in ("num_warps", "num_stages", "launch_pdl", "shared")}
        name = self.src.fn.fn.__name__
        self.gpu.launches.append(Launch(name, grid, run_time, constants, options, self.metadata.hash, stream))


def packed_argument(name: str, ty: str, value: Any, metadata: Any) -> Any:
    """An argument as its kernel gets it. Raises where the C launcher would, or where it would cut a number off."""
    if ty.startswith("*"):
        if value is None:
            return None
        if not hasattr(value, "data_ptr"):
            raise TypeError(f"{name}: a pointer argument must be a tensor or None, not {value!r}")
        return shape_of(value)
    if ty.startswith("tensordesc"):
        meta = (getattr(metadata, "tensordesc_meta", None) or [None])[0]
        return [str(part) for part in nvidia.make_tensordesc_arg(value, meta)]
    if ty in FLOATS:
        struct.pack("d", value)
        return value
    bits, signed = INTEGERS[ty], ty.startswith("i")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    if not low <= int(value) < high:
        raise OverflowError(f"{name}: {value} is no {ty}")
    return int(value)


def shape_of(t: Any) -> str:
    """A tensor as launches have it: its type and shape."""
    return f"{t.dtype}{tuple(t.shape)}".removeprefix("torch.")


def check_descriptor(
    at: int, swizzle: int, element: int, dtype: int, block: list[int], shape: list[int], strides: list[int], *_: int
) -> str:
    """As cuTensorMapEncodeTiled refuses (CUDA driver API): alignment, strides, the box's sides and its rows' bytes."""
    assert at % 16 == 0, "a descriptor's base must be aligned to 16 bytes"
    assert strides[-1] == 1 and all(stride * element % 16 == 0 for stride in strides[:-1]), f"strides {strides}"
    assert all(0 < n <= 2**32 for n in shape) and all(0 < n <= 256 for n in block), f"shape {shape}, box {block}"
    assert (block[-1] * element) % 16 == 0 and block[-1] * element <= {0: math.inf, 1: 32, 2: 64, 3: 128}[swizzle]
    return f"descriptor of {shape} by {block}"


def _pretend(gpu: StubGpu) -> Callable[..., Any]:
    """triton.compile without compiling: the key in the cache on disk, and a launcher. What only a compiler knows (shared
    memory, scratch memory) is 0."""

    def compile_(src: Any, target: Any = None, options: Any = None, _env_vars: Any = None) -> Any:
        backend = make_backend(target)
        parsed = backend.parse_options(dict(options or {}, **src.parse_options()))
        key = cache_key(src, backend, parsed)
        gpu.compilations[key] = src.fn.fn.__name__
        gpu.sources[key] = (src, target, options)
        metadata = SimpleNamespace(
            hash=key, shared=0, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
            profile_scratch_align=1, **{n: getattr(parsed, n) for n in ("num_warps", "num_stages", "launch_pdl")},
        )  # fmt: skip
        run = Launcher(gpu, src, metadata)
        return SimpleNamespace(
            run=run, function=None, packed_metadata=None, launch_metadata=lambda *_: None, metadata=metadata, src=src
        )

    return compile_


def cache_key(src: Any, backend: Any, options: Any) -> str:
    """The name of a compilation's folder in Triton's cache, before it is shortened."""
    return hashlib.sha256(get_cache_key(src, backend, options, get_cache_invalidating_env_vars()).encode()).hexdigest()


class TorchLaunches(TorchDispatchMode):
    """Notes the operations of torch that run a kernel. Composite ones are taken apart, as a device does."""

    def __init__(self, gpu: StubGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = op.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = op(*args, **kwargs)
        name = op.overloadpacket.__name__
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        results = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        on_device = any(t.device.type != "cpu" and t.numel() for t in results)
        if on_device and not views and name not in NO_LAUNCH:
            tensors = [
                t for t in tree_iter((args, kwargs, out)) if isinstance(t, torch.Tensor) and t.device.type != "cpu"
            ]
            shapes = {str(i): shape_of(t) for i, t in enumerate(tensors)}
            self.gpu.launches.append(Launch(f"aten::{name}", arguments=shapes, stream=self.gpu.stream))
        return out


def _kernels() -> list[JITFunction]:
    """Ours."""
    modules = [module for name, module in sys.modules.items() if name.startswith("ops.gpu.")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]


@contextmanager
def installed(compiles: bool = False, notes: bool = True) -> Iterator[StubGpu]:
    """Has Triton launch on the GPU, and torch and our code believe in it, as long as this lasts. Without `notes` a launch
    ends at the driver, unchecked, and torch's operations are left alone: what is over is the host's time."""
    gpu = StubGpu(compiles, notes)

    def listen(src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        gpu.compilations[metadata["hash"]] = src.fn.fn.__name__
        gpu.hits += cache_hit

    def forget() -> None:
        gpu_device.architecture.cache_clear()
        compiler.compiler.max_shared_mem.cache_clear()
        for kernel in _kernels():
            kernel.device_caches.clear()

    assert isinstance(moe.combine_kernel, JITFunction), "these are the interpreter's kernels"
    before, listener = drivers._active, knobs.compilation.listener
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        stack.enter_context(mock.patch.object(moe, "run_on_side_stream", gpu.beside))
        if not compiles:
            stack.enter_context(mock.patch.object(compiler, "compile", _pretend(gpu)))
        stack.callback(forget)
        stack.callback(setattr, knobs.compilation, "listener", listener)
        stack.callback(setattr, drivers, "_active", before)
        forget()
        drivers.set_active(StubDriver(gpu))
        knobs.compilation.listener = listen
        if notes:
            stack.enter_context(TorchLaunches(gpu))
        yield gpu
