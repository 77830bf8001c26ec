"""A device that torch does not have, for want of one: its tensors lie in the host's memory, but say "standin:0".

It is as strict as an accelerator: an op that is given a tensor of the host beside its own fails, and so does a dtype that
`lacks` names, as float64 does on MPS. Its collectives are gloo's under a name of their own, "standin_ccl".
torch's own hooks for backends in Python do the rest: it is registered once, for the whole process.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = torch.device("cpu")  # becomes standin:0
lacks: set[torch.dtype] = set()
seen: set[str] = set()  # the ops that ran on it
memory: list[int] = [1 << 32]  # bytes that are free; empty: it does not say
waits: list[str] = []  # the ops that had the host wait for it, as CUDA's do: see waiting
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
ACROSS = ("_to_copy", "copy_", "index", "index_put_", "set_data")  # may be given tensors of the host, too


class StandIn(torch.Tensor):
    """A tensor of the device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "StandIn":
        if held.dtype in lacks:
            raise TypeError(f"Cannot convert a tensor to {held.dtype}: the stand-in has no such type")
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"StandIn({self.held})"

    def tolist(self) -> list[Any]:
        """torch has none for subclasses of its own."""
        waits.append("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(op, args, kwargs or {})


@torch.inference_mode(False)  # a tensor of inference mode has no views that were made by Python
@torch.no_grad()
def dispatch(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = op.overloadpacket.__name__
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
    own = [t for t in tensors if isinstance(t, StandIn)]
    device = kwargs.get("device")
    here = device is None if own else device is not None and torch.device(device).type == DEVICE.type
    if not own and not here:
        return op(*args, **kwargs)
    if op.namespace == "c10d":
        return collective(name, args)
    seen.add(name)
    if waiting(name, args, kwargs):
        waits.append(name)
    strangers = [t for t in tensors if not isinstance(t, StandIn) and t.dim()]
    if own and strangers and name not in ACROSS:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got one on {strangers[0].device}")
    if device is not None:
        here = torch.device(device).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu"), "pin_memory": None} if "pin_memory" in kwargs else kwargs | {
            "device": torch.device("cpu")
        }
    elif name == "copy_":
        here = isinstance(args[0], StandIn)
    held = tree_map(lambda t: t.held if isinstance(t, StandIn) else t, (args, kwargs))
    out = op(*held[0], **held[1])
    if not here:
        return args[0] if name == "copy_" else out
    known = {id(t.held): t for t in own}  # what an op wrote to is what it returns
    return tree_map(lambda t: (known[id(t)] if id(t) in known else StandIn(t)) if isinstance(t, torch.Tensor) else t, out)


def waiting(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host waits: for results it asks for, for masks, and for every copy but one from pinned memory that
    may come later."""
    if name in ASKING:
        return True
    if name in ("index", "index_put_", "index_put"):
        return any(t is not None and (t.dtype == torch.bool or not isinstance(t, StandIn)) for t in args[1])
    if name not in ("_to_copy", "copy_"):
        return False
    source = args[1] if name == "copy_" else args[0]
    to_device = isinstance(args[0], StandIn) if name == "copy_" else kwargs.get("device", DEVICE).type == DEVICE.type
    if isinstance(source, StandIn):
        return not to_device
    later = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    return source.dim() > 0 and to_device and not (later and source in pinned)


class Pinned:
    """Tensors of the host in pinned memory, by identity."""

    def __init__(self) -> None:
        self.known: dict[int, torch.Tensor] = {}

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        self.known[id(x)] = x
        return x

    def __contains__(self, x: torch.Tensor) -> bool:
        return self.known.get(id(x)) is x


pinned = Pinned()


def collective(name: str, args: Any) -> Any:
    """By the backend that the group has for this device; a group without one raises."""
    group = next(a for a in tree_iter(args) if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
    backend = dist.ProcessGroup.unbox(group)._get_backend(DEVICE)
    held = tree_map(lambda t: t.held if isinstance(t, StandIn) else t, args)
    if name == "allreduce_":
        return args[0], _boxed(backend.allreduce(held[0]))
    if name == "alltoall_base_":
        output, x, _, of_output, of_x = held[:5]
        return _boxed(backend.alltoall_base(output, x, of_output, of_x))
    assert name == "allgather_", name
    return args[0], _boxed(backend.allgather(held[0], held[1]))


def _boxed(work: Any) -> Any:
    work.wait()
    return work.boxed()


class Everywhere(TorchDispatchMode):
    """Brings what makes new tensors here, too: only ops on tensors that exist come by the class."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which is never there, and would be imported for it

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(op, args, kwargs or {})


class Module:
    """torch.standin."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, index: int) -> None:
        assert index == 0, f"there is no standin:{index}"

    def manual_seed_all(self, seed: int) -> None:
        raise AssertionError("the engine draws its own random numbers")

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return memory[0], memory[0]  # an IndexError where it does not say


@contextlib.contextmanager
def registered() -> Iterator[torch.device]:
    """Has torch know the device, for good, and computes on it inside."""
    global DEVICE
    _setup_privateuseone_for_python_backend("standin", Module())
    DEVICE = torch.device("standin", 0)
    # where torch itself keeps modes and classes out: it brings an index that is a list to the tensor's device
    library = torch.library.Library("aten", "IMPL")
    for op in (torch.ops.aten.empty_strided.default, torch.ops.aten.empty.memory_format, torch.ops.aten.copy_.default):
        library.impl(op, lambda *args, op=op, **kwargs: dispatch(op, args, kwargs), "PrivateUse1")
    dist.Backend.register_backend("standin_ccl", _gloo, devices=["standin"])
    with Everywhere():
        yield DEVICE


def _gloo(store: Any, rank: int, size: int, timeout: Any) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout)
