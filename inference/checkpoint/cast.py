"""An FP8 Hugging Face checkpoint turned into a BF16 one: each weight times its block scales, rounded once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.partition import Partition
from checkpoint.reading import Entry, Reader
from checkpoint.transform import Output, hf_checkpoint, open_source, plain_config, write_checkpoint
from core.config import BLOCK_SIZE
from core.devices import holds
from core.errors import UserError
from core.numerics import Numerics
from ops.backend import ReferenceBackend, choose_backend
from parallel.startup import choose_device

SCALE = "_scale_inv"


@dataclass(slots=True)
class Copied(Output):
    """A tensor that stays as it is."""

    def begin(self, reader: Reader) -> Callable[[int, torch.Tensor], None]:
        return lambda row, window: self.put(window, row * self.source.row_bytes)


@dataclass(slots=True)
class FromWeight(Output):
    """What is made of the weight (R, C) of a linear layer: a plain one, or e4m3 with scales (ceil(R/128), ceil(C/128)),
    which are widened to float32."""

    scale: Entry | None
    device: torch.device
    ops: ReferenceBackend
    step = BLOCK_SIZE

    def begin(self, reader: Reader) -> Callable[[int, torch.Tensor], None]:
        return functools.partial(self.write, None if self.scale is None else reader.read(self.scale).float())

    def write(self, scale: torch.Tensor | None, row: int, window: torch.Tensor) -> None:
        raise NotImplementedError

    def weights(self, scale: torch.Tensor | None, row: int, window: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A window's rows (n, C) on the device: as they are, or multiplied by their scales and rounded to dtype."""
        w = window.view(self.source.dtype).to(self.device)
        if scale is None:
            return w
        s = scale[row // BLOCK_SIZE :][: -(-len(w) // BLOCK_SIZE)].to(self.device)
        return self.ops.weight_dequant(w, s, dtype)


@dataclass(slots=True)
class Dequantised(FromWeight):
    """The weight in BF16."""

    def write(self, scale: torch.Tensor | None, row: int, window: torch.Tensor) -> None:
        self.put(self.weights(scale, row, window, self.dtype).cpu(), 2 * row * self.source.row_bytes)


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
    if args.dtype != "fp8" and not checkpoint.quantised:
        raise UserError(f"{source}: holds no FP8 weights, so there is nothing to cast")
    checkpoint.check(Partition(args))
    entries = checkpoint.tensors(args)
    ops = choose_backend(where, Numerics(torch.float32))  # float32: weight_dequant alone needs no C compiler
    outputs: list[Output] = []
    for name, entry in entries.items():
        if 0 in entry.shape:
            continue
        if entry.dtype == torch.float8_e4m3fn and (scale := entries.get(name + SCALE)):
            outputs.append(Dequantised(name, entry, torch.bfloat16, entry.shape, scale, where, ops))
        elif not name.endswith(SCALE):
            outputs.append(Copied(name, entry, entry.dtype, entry.shape))
    new = hf_checkpoint(outputs, plain_config(source), source, "deepseek-v3-bf16", [where.type])
    write_checkpoint(new, state, target, "casting")
