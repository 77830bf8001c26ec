"""The devices that torch has here: which one a name means, what memory it has free, which types it can hold.

A kind of device is named in few places: here, where its kernels are chosen (ops/backend.py), and where something is
done for one kind alone. tests/project/test_devices.py has the list. Whatever has no kernels of ours runs the reference.
"""

import contextlib
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from core.errors import UserError, first_line

CPU = torch.device("cpu")
PACKAGES = {"npu": "torch_npu", "hpu": "habana_frameworks.torch"}  # kinds that torch knows once these are imported


def parse(name: str) -> torch.device:
    """The device that a name such as "cuda:1" means. Raises UserError, with a list of what can be used, for a name that
    torch does not know and for a device that is not here."""
    kind, here = name.partition(":")[0], f"this torch ({torch.__version__}) has {' and '.join(available())}"
    why = ""
    if kind in PACKAGES:
        try:
            importlib.import_module(PACKAGES[kind])
        except Exception as e:  # whatever a driver that is missing makes of it
            why = f", and {PACKAGES[kind]} cannot be imported ({first_line(e)})"
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise UserError(f"--device {name}: torch knows no such device{why}; {here}") from None
    if device.type == "meta":
        raise UserError("--device meta: its tensors hold no numbers; plan.py says what a run would take")
    n = count(kind)
    if n == 0:
        raise UserError(f"--device {name}: there is none that torch can use{why}; {here}")
    if device.index is not None and device.index >= n:
        raise UserError(f"--device {name}: there {'is' if n == 1 else 'are'} {n}, counted from 0")
    return device


def available() -> list[str]:
    """The kinds of device that can be used."""
    kinds = {"cuda", "xpu", "mps", *PACKAGES}
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        kinds.add(accelerator.type)
    return ["cpu", *sorted(kind for kind in kinds if count(kind))]


def count(kind: str) -> int:
    """How many devices of a kind there are."""
    if kind == "cpu":
        return 1
    module = _module(kind)
    with contextlib.suppress(Exception):  # a driver that does not answer
        if module is not None and module.is_available():
            return module.device_count()
    return 0


def _module(kind: str) -> Any:
    """What torch has for a kind of device: torch.cuda, torch.xpu, …; None if it has nothing."""
    return getattr(torch, kind, None)


def make_current(device: torch.device) -> None:
    """Kernels are launched on the current device of a kind, whatever their tensors are on."""
    if device.type != "cpu" and device.index is not None and hasattr(module := _module(device.type), "set_device"):
        module.set_device(device.index)


def synchronise(device: torch.device) -> None:
    """Waits until a GPU, or what else works later than the host, has done what it was given."""
    if copies_later(device):
        _module(device.type).synchronize(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device other than a CPU; None where it does not say."""
    module = _module(device.type)
    with contextlib.suppress(Exception):
        if hasattr(module, "mem_get_info"):
            return int(module.mem_get_info(device)[0])
        if device.type == "mps":  # shared with the host: what Metal recommends, less what this process has
            return max(0, module.recommended_max_memory() - module.driver_allocated_memory())
        return int(torch.accelerator.get_memory_info(device)[0])
    return None


def name(device: torch.device) -> str:
    """A device's product name, its kind where torch does not tell."""
    with contextlib.suppress(Exception):
        return str(_module(device.type).get_device_name(device))
    return device.type


def uuid(device: torch.device) -> str:
    """A device's own identifier, the same in whatever process; empty where torch does not tell."""
    with contextlib.suppress(Exception):
        return str(_module(device.type).get_device_properties(device).uuid)
    return ""


@functools.cache
def holds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of this type can be on a device: MPS, for one, has neither float64 nor FP8."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        return torch.full((2,), 1.5, device=device).to(dtype).float().tolist() == [1.5, 1.5]
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def copies_later(device: torch.device | str) -> bool:
    """Whether the host goes on while it sends to a device. Only a GPU may copy later: MPS then reads memory that has
    been freed by its owner (https://github.com/pytorch/pytorch/issues/189690)."""
    return torch.device(device).type == "cuda"


def upload(values: Sequence[Any] | np.ndarray, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Numbers of the host as a tensor on a device. From pinned memory, as a GPU has the host wait for any other; torch
    gives that memory to nobody else before it has been read."""
    later = copies_later(device)
    found = torch.as_tensor(np.array(values), dtype=dtype)  # of a list torch itself takes three times as long
    return (found.pin_memory() if later else found).to(device, non_blocking=later)



def select(x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """x's rows of these numbers, of which the host knows: a view where they follow each other."""
    if not rows or list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows)] if rows else x[:0]
    return x.index_select(0, upload(rows, torch.int64, x.device))
