"""Triton's interpreter without what it does over and over: a third of the time that interpreted kernels take.

Imported for what it does. A launch puts the interpreter's functions in the place of the language's, and takes them away
at its end. To find them it looks through the whole language each time, and it does the same at every call of a function
of ours inside the kernel, where they are in their places already. Here they are looked up once, and a call is a call.
"""

import functools
import inspect
import types
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


def _call(self: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return self.rewrite()(*arguments, **options)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


_whole_language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
_patch_lang = interpreter._patch_lang
_number = functools.cache(interpreter._get_np_dtype)


def _get_np_dtype(dtype: Any) -> Any:
    """Of a block that of its elements. A dictionary of all types is made for the first of each."""
    dtype = dtype.scalar
    return np.dtype(np.uint64) if isinstance(dtype, tl.pointer_type) else _number(dtype)


for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):  # before anything replaces them
    _builtins(package)
interpreter._patch_builtin = _patch_builtin
interpreter._patch_lang = lambda function: _patch_lang(_whole_language)  # all that functions it calls may need
interpreter._get_np_dtype = _get_np_dtype
interpreter.InterpretedFunction.__call__ = _call
