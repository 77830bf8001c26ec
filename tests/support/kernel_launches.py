"""Launches of kernels written down instead of made, to be compared with the configurations that are compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


class Recorder:
    """Stands in for a kernel: each launch appends its name and its constants (flags, and absent pointers) to `asked`."""

    def __init__(self, kernel: Any, name: str, asked: list[tuple[str, dict[str, Any]]]) -> None:
        self.name, self.arg_names, self.asked = name, kernel.arg_names, asked

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            absent = {n: a for n, a in zip(self.arg_names, args, strict=False) if a is None}
            self.asked.append((self.name, absent | kwargs))

        return launch


@contextmanager
def only_listed_launches(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is launched of a module's kernels inside is what kernel_configurations.py lists for it and sm_90, and all of that."""
    from support.kernel_configurations import configurations  # imports Triton, without which its tests are skipped

    listed = [(c.kernel.fn.__name__, c.constexprs | c.options) for c in configurations(module) if c.target == "sm_90"]
    asked: list[tuple[str, dict[str, Any]]] = []
    for name in {name for name, _ in listed}:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), name, asked))
    yield
    assert all(request in listed for request in asked), [request for request in asked if request not in listed]
    assert all(one in asked for one in listed), [one for one in listed if one not in asked]
