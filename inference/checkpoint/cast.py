"""A quantised Hugging Face checkpoint turned into a BF16 one: each weight times its block scales, rounded once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint.directory import QUANTISED
from checkpoint.partition import Partition
from checkpoint.reading import Entry, Reader
from checkpoint.table import quantised_form
from checkpoint.transform import Output, hf_checkpoint, open_source, plain_config, write_checkpoint
from core.config import BLOCK_SIZE
from core.devices import holds
from core.errors import UserError
from core.numerics import Numerics
from ops.backend import ReferenceBackend, choose_backend
from parallel.startup import choose_device

SCALE, ZERO = "_scale_inv", "_zero_point"  # after the name of a weight


@dataclass(slots=True)
class Copied(Output):
    """A tensor that stays as it is."""

    def begin(self, reader: Reader) -> Callable[[int, torch.Tensor], None]:
        return lambda row, window: self.put(window, row * self.source.row_bytes)


@dataclass(slots=True)
class FromWeight(Output):
    """What is made of the weight (R, C) of a linear layer: a plain one, or a quantised one with its block scales, which
    are widened to float32, and zero points if any."""

    scale: Entry | None
    device: torch.device
    ops: ReferenceBackend
    zero: Entry | None = field(default=None, kw_only=True)
    block: tuple[int, int] = field(default=(BLOCK_SIZE, BLOCK_SIZE), kw_only=True)
    step = BLOCK_SIZE

    def begin(self, reader: Reader) -> Callable[[int, torch.Tensor], None]:
        scale, zero = (None if entry is None else reader.read(entry) for entry in (self.scale, self.zero))
        return functools.partial(self.write, scale, zero)

    def write(self, scale: torch.Tensor | None, zero: torch.Tensor | None, row: int, window: torch.Tensor) -> None:
        raise NotImplementedError

    def weights(
        self, scale: torch.Tensor | None, zero: torch.Tensor | None, row: int, window: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """A window's rows (n, C) on the device: as they are, or multiplied by their scales and rounded to dtype."""
        w, rows = window.view(self.source.dtype).to(self.device), self.block[0]
        if scale is None:
            return w
        s, z = (None if t is None else t[row // rows :][: -(-len(w) // rows)].to(self.device) for t in (scale, zero))
        assert s is not None
        return self.ops.weight_dequant(w, s.float(), dtype, self.block, z)


@dataclass(slots=True)
class Dequantised(FromWeight):
    """The weight in BF16."""

    def write(self, scale: torch.Tensor | None, zero: torch.Tensor | None, row: int, window: torch.Tensor) -> None:
        self.put(self.weights(scale, zero, row, window, self.dtype).cpu(), 2 * row * self.shape[1])


def cast(source: Path, target: Path, device: str = "auto") -> None:
    """Writes the BF16 form of `source` to `target`, dequantised on `device`: one of torch's names, or "auto", a GPU
    if any.

    Raises UserError, before anything is written to the target, for a damaged checkpoint, a weight without its scale, a
    checkpoint that is not FP8, a missing GPU, or a target that cannot be written to.
    """
    where = choose_device(device, 0, 1)
    if not holds(where, torch.float8_e4m3fn):
        raise UserError(f"--device {device}: {where.type} has no FP8 in torch; --device cpu has")
    checkpoint, state = open_source(source, target)
    args = checkpoint.args
    assert args is not None
    if not args.is_quantised and not checkpoint.quantised:
        raise UserError(f"{source}: holds no FP8, INT8 or INT4 weights, so there is nothing to cast")
    checkpoint.check(Partition(args))
    entries = checkpoint.tensors(args)
    ops = choose_backend(where, Numerics(torch.float32))  # float32: weight_dequant alone needs no C compiler
    outputs: list[Output] = []
    for name, entry in entries.items():
        if 0 in entry.shape:
            continue
        if entry.dtype in QUANTISED and (scale := entries.get(name + SCALE)):
            form = quantised_form(args)
            shape = entry.shape[0], entry.shape[1] * form.packing
            zero, block = entries.get(name + ZERO), form.block
            outputs.append(
                Dequantised(name, entry, torch.bfloat16, shape, scale, where, ops, zero=zero, block=block)
            )
        elif not name.endswith((SCALE, ZERO)):
            outputs.append(Copied(name, entry, entry.dtype, entry.shape))
    new = hf_checkpoint(outputs, plain_config(source), source, "deepseek-v3-bf16", [where.type])
    write_checkpoint(new, state, target, "casting")
