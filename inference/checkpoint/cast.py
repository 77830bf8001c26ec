"""An FP8 Hugging Face checkpoint turned into a BF16 one: each weight times its block scales, rounded once."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.manifest import CAST_MARK, HF_INDEX
from checkpoint.partition import Partition
from checkpoint.reading import Entry, Reader
from checkpoint.transform import NewCheckpoint, Output, OutputFile, open_source, small_files, write_checkpoint
from core.config import BLOCK_SIZE
from core.devices import holds
from core.errors import UserError
from core.files import read_json
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
class Dequantised(Output):
    """BF16 (R, C) of e4m3 (R, C) and its scales (ceil(R/128), ceil(C/128)), which are widened to float32."""

    scale: Entry
    device: torch.device
    ops: ReferenceBackend
    step = BLOCK_SIZE

    def begin(self, reader: Reader) -> Callable[[int, torch.Tensor], None]:
        return functools.partial(self._write, reader.read(self.scale).float())

    def _write(self, scale: torch.Tensor, row: int, window: torch.Tensor) -> None:
        q = window.view(self.source.dtype).to(self.device)
        s = scale[row // BLOCK_SIZE :][: -(-len(q) // BLOCK_SIZE)].to(self.device)
        self.put(self.ops.weight_dequant(q, s, torch.bfloat16).cpu(), 2 * row * self.source.row_bytes)


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
    files: dict[str, list[Output]] = {}
    for name, entry in entries.items():
        if 0 in entry.shape:
            continue
        outputs = files.setdefault(entry.file.name, [])
        if entry.dtype == torch.float8_e4m3fn and (scale := entries.get(name + SCALE)):
            outputs.append(Dequantised(name, entry, torch.bfloat16, entry.shape, scale, where, ops))
        elif not name.endswith(SCALE):
            outputs.append(Copied(name, entry, entry.dtype, entry.shape))
    new = [OutputFile(file, CAST_MARK, outputs) for file, outputs in sorted(files.items()) if outputs]

    config = read_json(source / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    if "dtype" not in config:  # as transformers 5 spells it
        config["torch_dtype"] = "bfloat16"
    texts = {"config.json": config}
    if [file.name for file in new] != ["model.safetensors"]:
        weight_map = {output.name: file.name for file in new for output in file.outputs}
        total = sum(output.nbytes for file in new for output in file.outputs)
        texts[HF_INDEX] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    copies = [path for path in small_files(source) if path.name != "config.json"]
    write_checkpoint(NewCheckpoint(new, config, copies, texts, options=[where.type]), state, target, "casting")
