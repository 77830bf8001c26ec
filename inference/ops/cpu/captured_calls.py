"""A forward as the list of calls it makes, which later ones of the same shape make again: C's functions and torch's ops
on the memory they had, without the Python between them.

That Python takes 20 microseconds an op and 1 to 2 ms a step, whatever the model; for one sequence it is a tenth of the
time. What CUDA graphs do for launches this does for calls, and under the same rule: shapes, and what Python decides,
must not depend on values.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What takes the calls of this thread; None: they are only made.
_active: ContextVar["CapturedCalls | None"] = ContextVar("captured_calls", default=None)

aten = torch.ops.aten
ALLOCATIONS = (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided)
# Tensor.tolist calls the first two, then reads without an op; the others are made of ops that inference mode hides.
READS = (aten.resolve_conj, aten.resolve_neg, aten.repeat_interleave, aten.where.default, aten.argwhere)
LARGEST = 32 << 20  # bytes of a result; one that is larger is a weight that each forward dequantises
BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class UncapturableError(Exception):
    """A forward reads a tensor's values, so that another one may make other calls, or makes too much to keep."""


class Scratch:
    """Working memory for one call at a time, shared by all captures, which never run at the same time."""

    def __init__(self, nbytes: int = 0):
        self._held = torch.empty(nbytes, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """An uninitialised uint8 tensor (nbytes,). The next call may overwrite it."""
        if len(self._held) < nbytes:
            self._held = torch.empty(nbytes, dtype=torch.uint8)
        return self._held[:nbytes]


class CapturedCalls(TorchDispatchMode):
    """The calls of one forward, in order. Keeps all tensors that they read and write."""

    def __init__(self, scratch: Scratch):
        super().__init__()
        self.scratch = scratch
        self._calls: list[Callable[[], Any]] = []
        self._kept: list[Any] = []  # what addresses in _calls point to

    @contextlib.contextmanager
    def active(self) -> Iterator["CapturedCalls"]:
        """Captures the calls made within. Raises UncapturableError where the forward reads values."""
        token = _active.set(self)
        try:
            with torch.inference_mode(), self:  # inference mode shows all ops, tolist's too
                yield self
        finally:
            _active.reset(token)

    def replay(self) -> None:
        """Makes all calls again."""
        for call in self._calls:
            call()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False, since True has torch import its compiler, which takes a second, at the first call."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _depends_on_values(func, args):
            raise UncapturableError(str(func))
        out = func(*args, **kwargs)
        results = [t for t in (out if isinstance(out, tuple | list) else [out]) if t is not None]
        if not all(isinstance(t, torch.Tensor) for t in results):
            raise UncapturableError(str(func))
        if func._schema.is_mutable:
            self._calls.append(partial(func, *args, **kwargs))
        elif func.overloadpacket not in ALLOCATIONS and not _are_views(results, (args, kwargs)):
            if (most := max(t.nbytes for t in results)) > LARGEST:
                raise UncapturableError(f"{func} makes {most} bytes, which would be kept")
            self._calls.append(partial(_compute_into, results, func, args, kwargs))
        return out

    def call(self, function: Any, argtypes: list[Any], args: tuple[Any, ...]) -> None:
        """Calls a C function that returns nothing, and appends the call with its converted arguments."""
        converted = [_converted(kind, value) for kind, value in zip(argtypes, args, strict=True)]
        function(*converted)
        self._calls.append(partial(function, *converted))
        self._kept.append(args)


def active_capture() -> CapturedCalls | None:
    return _active.get()


def _compute_into(results: list[torch.Tensor], func: Any, args: Any, kwargs: Any) -> None:
    out = func(*args, **kwargs)
    for to, made in zip(results, out if isinstance(out, tuple | list) else [out], strict=True):
        assert to.shape == made.shape, f"{func} made another shape than when it was recorded"
        to.copy_(made)


def _converted(kind: Any, value: Any) -> Any:
    """An argument as C takes it: `kind` is one of ctypes' numbers, or has `from_param`."""
    return kind(value) if issubclass(kind, ctypes._SimpleCData) else kind.from_param(value)


def _depends_on_values(func: Any, args: Any) -> bool:
    """Whether an op reads values, or its result's shape follows from them, as from the count of a mask."""
    if func.overloadpacket is aten.index:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return func in READS or func.overloadpacket in READS or any(tag in func.tags for tag in BY_VALUE)


def _are_views(results: list[torch.Tensor], given: Any) -> bool:
    """Whether all results share memory with the arguments, so that a replay has nothing to compute for them."""
    held = {t.untyped_storage().data_ptr() for t in _tensors(given)}
    return all(t.untyped_storage().data_ptr() in held for t in results)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
