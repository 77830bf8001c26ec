"""A checkpoint's weights, read into one rank's model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from checkpoint.directory import Checkpoint
from checkpoint.partition import Ranges
from checkpoint.reading import Entry, Reader, dtype_and_shape, require_equal
from checkpoint.table import FP8, PLAIN, fp8_rows, scale_name
from core import devices
from core.config import BLOCK_SIZE, ModelArgs
from core.errors import UserError, warn
from core.numerics import Numerics
from parallel.group import SOLO, Group


@dataclass
class TensorCopy:
    """A tensor on disk, or the part of it that a rank holds, and the parameter or its rows that it fills."""

    entry: Entry
    cut: Ranges
    target: torch.Tensor
    scale: Entry | None = None  # of an FP8 tensor that is dequantised as it is read


def load_into(model: nn.Module, checkpoint: Checkpoint, group: Group = SOLO, progress: bool = True) -> None:
    """Fills every parameter of one rank's model in place, and reads only that rank's part of the checkpoint.

    FP8 weights stay FP8 where the parameter is FP8; elsewhere they become float32(q) * scale, rounded once to the
    parameter's dtype. Other tensors are widened exactly, or, except for those that the table calls exact, rounded to
    the bfloat16 of their parameter. Everything is checked before any weight is read. Raises UserError when the
    checkpoint is damaged or does not fit the model.
    """
    copies = plan_load(model, checkpoint, group)
    zero_padding(model)
    total = sum(c.entry.row_bytes * (c.cut[0][1] - c.cut[0][0]) for c in copies)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress or group.rank != 0)
    with bar, Reader() as reader, torch.no_grad():
        scales = {id(c): reader.read(c.scale).float() for c in sorted(copies, key=_scale_position) if c.scale}
        for copy in sorted(copies, key=lambda c: (c.entry.file, c.entry.start)):
            _fill(copy, scales.pop(id(copy), None), reader, bar)


def _scale_position(copy: TensorCopy) -> tuple[str, int]:
    return (str(copy.scale.file), copy.scale.start) if copy.scale else ("", 0)


def plan_load(model: nn.Module, checkpoint: Checkpoint, group: Group) -> list[TensorCopy]:
    """A copy for each parameter, or for each tensor of a stacked one. Raises UserError where model and checkpoint do
    not match."""
    args: ModelArgs = model.args  # type: ignore[assignment]
    parameters = dict(model.named_parameters())
    num: Numerics = model.num  # type: ignore[assignment]
    expected = checkpoint.expected(args)
    partition = checkpoint.partition(args, group.size, num.experts, fp8_rows(expected, num))
    if checkpoint.kind == "upstream" and group.rank == 0:
        warn(f"{checkpoint.path} was converted by another program: no MTP module, no checksums, no config.json")
    elif args.n_mtp_layers and not checkpoint.has_mtp and group.rank == 0:
        warn(f"{checkpoint.path} has no MTP module, though its config names one")
    entries = checkpoint.check(partition, group.rank)
    if args.tie_word_embeddings and "head.weight" in entries:  # then it must be the embedding
        require_equal(entries["embed.weight"], entries["head.weight"])
    if num.gemm is not None and not checkpoint.quantised:
        raise UserError(f"{checkpoint.path}: the model wants FP8 weights, the checkpoint is not FP8")
    copies: list[TensorCopy] = []
    used: set[str] = set()
    for parameter, target in parameters.items():
        for name, rows in _disk_names(model, parameter, target, partition.held_experts(group.rank)):
            if name not in entries:
                raise UserError(f"{checkpoint.path}: nothing there for the model's {parameter}")
            # a converted file holds the rank's part already
            cut = partition.cut(expected[name], group.rank) if checkpoint.kind == "hf" else None
            copies.append(_tensor_copy(name, rows, entries, cut, expected[name].exact))
            used |= {name} | ({scale_name(name)} if copies[-1].scale else set())
    optional = {name for name, spec in expected.items() if not spec.required or name.startswith("mtp.")}
    if unused := sorted(entries.keys() - used - optional):
        raise UserError(f"{entries[unused[0]]}: the model has no place for it")
    return copies


def _disk_names(
    model: nn.Module, parameter: str, target: torch.Tensor, held: range
) -> Iterator[tuple[str, torch.Tensor]]:
    """The names of a parameter's tensors on disk, each with the rows of the parameter that it fills.

    The experts that a parameter stacks are single tensors there, and so are the projections that model.Linear stacks.
    """
    owner, _, leaf = parameter.rpartition(".")
    linear: Any = model.get_submodule(owner)
    before, stacked, projection = owner.partition(".experts.")
    if stacked:
        assert len(target) == len(held), f"{parameter} stacks {len(target)} experts, this rank has {len(held)}"
        whole = [(f"{before}.experts.{e}.{projection}", rows) for e, rows in zip(held, target, strict=True)]
    else:
        whole = [(owner, target)]
    for name, rows in whole:
        if not (parts := getattr(linear, "parts", None)):
            yield f"{name}.{leaf}" if name else leaf, rows
            continue
        unit = BLOCK_SIZE if leaf == "scale" else 1
        for start, (part, width) in zip(linear.starts, parts.items(), strict=True):
            first = start // unit
            sibling = ".".join((*name.split(".")[:-1], part, leaf))
            yield sibling, rows[first : first + math.ceil(width / unit)]


def zero_padding(model: nn.Module) -> None:
    """Zeros weights that have padding rows between stacked FP8 projections, as no tensor fills those."""
    for module in model.modules():
        if parts := getattr(module, "parts", None):
            linear: Any = module
            if sum(parts.values()) < linear.weight.shape[-2]:
                linear.weight.data.view(torch.uint8).zero_()


def _tensor_copy(
    name: str, target: torch.Tensor, entries: dict[str, Entry], cut: Ranges | None, exact: bool
) -> TensorCopy:
    """The copy of a tensor's `cut` (None: all of it) to `target`. `exact`: it may be widened and not rounded. Raises
    UserError unless shape and dtype fit."""
    entry = entries[name]
    copy = TensorCopy(entry, cut or tuple((0, n) for n in entry.shape), target)
    shape = tuple(b - a for a, b in copy.cut)
    if shape != target.shape:
        raise UserError(f"{entry}: the model's {name} is {tuple(target.shape)}, the checkpoint's part for it {shape}")
    if entry.dtype == FP8 and target.dtype != FP8:
        copy.scale = entries[scale_name(name)]
    widened = target.dtype in (entry.dtype, torch.float32)  # which holds all numbers of the others
    rounded = not exact and entry.dtype in PLAIN and target.dtype == torch.bfloat16  # choose_numerics says so
    if not (copy.scale or widened or rounded):
        wanted, got = dtype_and_shape(target.dtype, shape), dtype_and_shape(entry.dtype, shape)
        raise UserError(f"{entry}: the model's {name} is {wanted}, the checkpoint's is {got}")
    return copy


def _fill(copy: TensorCopy, scale: torch.Tensor | None, reader: Reader, bar: Any) -> None:
    entry, target = copy.entry, copy.target
    (first, last), columns = copy.cut[0], copy.cut[1:]
    raw = target.dtype == entry.dtype
    width = entry.row_bytes if raw else entry.row_bytes // entry.dtype.itemsize
    flat = target.view(len(target), -1)
    if raw:  # bytes are copied: there is no arithmetic on FP8
        flat = flat.view(torch.uint8)
    unit = width // (entry.shape[1] if columns else 1)
    start, stop = (columns[0][0] * unit, columns[0][1] * unit) if columns else (0, width)
    if scale is not None:
        across = torch.arange(start, stop) // BLOCK_SIZE
    for row, window in reader.rows(entry, first, last):
        data = window if raw else window.view(entry.dtype)
        data = data[:, start:stop]
        if entry.dtype == torch.float8_e8m0fnu or not devices.holds(target.device, data.dtype):
            data = data.float()  # while it is on the CPU: other devices have no casts of this type
        data = data.to(target.device)
        if scale is not None:
            down = torch.arange(row, row + len(data)) // BLOCK_SIZE
            data = data.float() * scale[down][:, across].to(target.device)
        flat[row - first : row - first + len(data)].copy_(data)
        bar.update(window.numel())
