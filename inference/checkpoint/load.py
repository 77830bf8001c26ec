"""A checkpoint's weights, read into one rank's model."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from checkpoint.directory import Checkpoint
from checkpoint.partition import Partition, Ranges, file_rank
from checkpoint.reading import Entry, Reader, dtype_and_shape, require_equal
from checkpoint.table import PLAIN, Spec, quantised_rows, scale_name, zero_name
from core import devices
from core.config import ModelArgs
from core.errors import UserError, warn
from core.numerics import Form, Numerics
from core.stages import Stage
from ops import reference

NUMBERED = re.compile(r"\.(attn|ffn)\.(\d+)\.")  # a shard of several in one rank: see model.VirtualRanks


@dataclass
class TensorCopy:
    """A tensor on disk, or the part of it that a rank holds, and the parameter or its rows that it fills."""

    entry: Entry
    cut: Ranges
    target: torch.Tensor
    # of a quantised tensor that is dequantised as it is read
    form: Form | None = None
    scale: Entry | None = None
    zero: Entry | None = None


def load_into(model: nn.Module, checkpoint: Checkpoint, progress: bool = True) -> None:
    """Fills every parameter of one rank's model in place, and reads only that rank's part of the checkpoint.

    Quantised weights stay so where the parameter is; elsewhere they become float32(q) * scale, rounded once to the
    parameter's dtype. Other tensors are widened exactly, or, except for those that the table calls exact, rounded to
    the bfloat16 of their parameter. Everything is checked before any weight is read. Raises UserError when the
    checkpoint is damaged or does not fit the model.
    """
    copies = plan_load(model, checkpoint)
    zero_padding(model)
    total = sum(c.entry.row_bytes * (c.cut[0][1] - c.cut[0][0]) for c in copies)
    hidden = not progress or _place(model)[0] != 0 or None  # None: unless it is a terminal
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=hidden)
    with bar, Reader() as reader, Reader() as beside, torch.no_grad():  # a scale may lie in another file
        for copy in sorted(copies, key=lambda c: (c.entry.file, c.entry.start)):
            scale, zero = (beside.read(entry).float() if entry else None for entry in (copy.scale, copy.zero))
            _fill(copy, scale, zero, reader, bar)


def _place(model: Any) -> tuple[int, int, int]:
    """The number of a model's rank, how many there are, and in how many lanes."""
    tp, dp = model.tp, model.dp
    return dp.rank * tp.size + tp.rank, dp.size * tp.size, dp.size


def plan_load(model: nn.Module, checkpoint: Checkpoint) -> list[TensorCopy]:
    """A copy for each parameter, or for each tensor of a stacked one. Raises UserError where model and checkpoint do
    not match."""
    args: ModelArgs = model.args  # type: ignore[assignment]
    parameters = dict(model.named_parameters())
    num: Numerics = model.num  # type: ignore[assignment]
    expected = checkpoint.expected(args)
    rank, ranks, lanes = _place(model)
    partition = checkpoint.partition(args, ranks, num.experts, quantised_rows(expected, num), lanes)
    if checkpoint.kind == "upstream" and rank == 0:
        warn(f"{checkpoint.path} was converted by another program: no MTP module, no checksums, no config.json")
    elif args.n_mtp_layers and not checkpoint.has_mtp and rank == 0:
        warn(f"{checkpoint.path} has no MTP module, though its config names one")
    files = checkpoint.partition_of_files(partition)
    sources: dict[int, dict[str, Entry]] = {}  # by the rank that files were made for

    def tensors(of: int) -> dict[str, Entry]:
        if of not in sources:
            sources[of] = checkpoint.check(files, of)
        return sources[of]

    own = rank * files.ranks // ranks
    entries = tensors(own)
    if args.tie_word_embeddings and "head.weight" in entries:  # then it must be the embedding
        require_equal(entries["embed.weight"], entries["head.weight"])
    if num.gemm is not None and not checkpoint.quantised:
        raise UserError(f"{checkpoint.path}: the model wants quantised weights, the checkpoint's are not")
    virtual = partition
    if num.virtual_ranks > 1:
        virtual = Partition(args, num.virtual_ranks, num.experts, partition.quantised)
    copies: list[TensorCopy] = []
    used: set[str] = set()
    for parameter, target in parameters.items():
        of, number = _shard_of(parameter, partition, rank, virtual)
        for name, rows in _disk_names(model, parameter, target, of.held_experts(number)):
            if (spec := expected.get(name)) is None:
                raise UserError(f"{checkpoint.path}: nothing there for the model's {parameter}")
            cut, source = of.cut(spec, number), own
            if checkpoint.kind != "hf" and spec.split is not None:
                source = file_rank(spec, of, number, files)
                if cut is not None and (held := files.cut(spec, source)) is not None:  # the part of the file's part
                    cut = tuple((a - first, b - first) for (a, b), (first, _) in zip(cut, held, strict=True))
            if name not in (found := tensors(source)):
                raise UserError(f"{checkpoint.path}: nothing there for the model's {parameter}")
            copies.append(_tensor_copy(name, rows, found, cut, spec))
            used |= {name, *({scale_name(name), zero_name(name)} if copies[-1].scale else ())}
    optional = {name for name, spec in expected.items() if not spec.required or name.startswith("mtp.")}
    stage: Stage = model.stage  # type: ignore[assignment]
    mtp, tied = checkpoint.has_mtp, args.tie_word_embeddings
    others = {name for name in entries if name in expected and (  # another rank's, or another stage's
              partition.cut(expected[name], rank) is None or not stage.has(name, mtp, tied))}  # fmt: skip
    if unused := sorted(entries.keys() - used - optional - others):
        raise UserError(f"{entries[unused[0]]}: the model has no place for it")
    return copies


def _shard_of(parameter: str, partition: Partition, rank: int, virtual: Partition) -> tuple[Partition, int]:
    """The partition of whose parts a parameter is one, and which: this rank's, or a virtual rank's (model.VirtualRanks)
    where its name has the number of one that this rank stands for."""
    if (found := NUMBERED.search(parameter)) is None:
        return partition, rank
    of, number = (partition.ranks, partition.shard(rank)) if found[1] == "ffn" else (partition.tp, rank % partition.tp)
    return virtual, number * (virtual.ranks // of) + int(found[2])


def _disk_names(
    model: nn.Module, parameter: str, target: torch.Tensor, held: range
) -> Iterator[tuple[str, torch.Tensor]]:
    """The names of a parameter's tensors on disk, each with the rows of the parameter that it fills.

    The experts that a parameter stacks are single tensors there, and so are the projections that model.Linear stacks.
    """
    owner, _, leaf = parameter.rpartition(".")
    linear: Any = model.get_submodule(owner)
    owner = NUMBERED.sub(r".\1.", owner + ".").removesuffix(".")
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
        unit = linear.block[0] if leaf in ("scale", "zero") else 1
        for start, (part, width) in zip(linear.starts, parts.items(), strict=True):
            first = start // unit
            sibling = ".".join((*name.split(".")[:-1], part, leaf))
            yield sibling, rows[first : first + math.ceil(width / unit)]


def zero_padding(model: nn.Module) -> None:
    """Zeros weights that have padding rows between stacked quantised projections, as no tensor fills those."""
    for module in model.modules():
        if parts := getattr(module, "parts", None):
            linear: Any = module
            if sum(parts.values()) < linear.weight.shape[-2]:
                linear.weight.data.view(torch.uint8).zero_()


def _tensor_copy(
    name: str, target: torch.Tensor, entries: dict[str, Entry], cut: Ranges | None, spec: Spec
) -> TensorCopy:
    """The copy of a tensor's `cut` (None: all of it) to `target`. Raises UserError unless shape and dtype fit."""
    entry = entries[name]
    copy = TensorCopy(entry, cut or tuple((0, n) for n in entry.shape), target)
    shape = tuple(b - a for a, b in copy.cut)
    if spec.form is not None and spec.form.is_quantised and target.dtype != entry.dtype:
        copy.form, copy.scale, copy.zero = spec.form, entries[scale_name(name)], entries.get(zero_name(name))
        shape = *shape[:-1], shape[-1] * spec.form.packing
    if shape != target.shape:
        raise UserError(f"{entry}: the model's {name} is {tuple(target.shape)}, the checkpoint's part for it {shape}")
    widened = target.dtype in (entry.dtype, torch.float32)  # which holds all numbers of the others
    # choose_numerics says so
    rounded = not spec.exact and entry.dtype in PLAIN and target.dtype == torch.bfloat16
    if not (copy.scale or widened or rounded):
        wanted, got = dtype_and_shape(target.dtype, shape), dtype_and_shape(entry.dtype, shape)
        raise UserError(f"{entry}: the model's {name} is {wanted}, the checkpoint's is {got}")
    return copy


def _fill(
    copy: TensorCopy, scale: torch.Tensor | None, zero: torch.Tensor | None, reader: Reader, bar: Any
) -> None:
    """Reads a tensor's cut and writes it to its target. `scale`, `zero`: those of the whole tensor, float32."""
    entry, target = copy.entry, copy.target
    (first, last), columns = copy.cut[0], copy.cut[1:]
    raw = target.dtype == entry.dtype
    width = entry.row_bytes if raw else entry.row_bytes // entry.dtype.itemsize
    flat = target.view(len(target), -1)
    if raw:  # bytes are copied: there is no arithmetic on FP8
        flat = flat.view(torch.uint8)
    unit = width // (entry.shape[1] if columns else 1)
    start, stop = (columns[0][0] * unit, columns[0][1] * unit) if columns else (0, width)
    for row, window in reader.rows(entry, first, last):
        data = window if raw else window.view(entry.dtype)
        data = data[:, start:stop]
        if entry.dtype == torch.float8_e8m0fnu or not devices.holds(target.device, data.dtype):
            data = data.float()  # while it is on the CPU: other devices have no casts of this type
        if copy.form is None or copy.form.kind == "fp8":
            data = data.to(target.device)
        if copy.form is not None and scale is not None:
            data = _dequantised(data, copy.form, row, start, scale, zero)
        flat[row - first : row - first + len(data)].copy_(data)
        bar.update(window.numel())


def _dequantised(
    data: torch.Tensor, form: Form, row: int, column: int, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    """What rows of a quantised tensor stand for, from `row` and the number `column` in each row on: float32."""
    device = data.device
    if form.kind == "int4":
        data = reference.unpack_int4(data)
    down = torch.arange(row, row + len(data)) // form.block[0]
    across = (torch.arange(data.shape[1]) + column * form.packing) // form.block[1]

    def spread(blocks: torch.Tensor) -> torch.Tensor:
        return blocks[down][:, across].to(device)

    values = data.float()
    if form.kind == "int4":
        values -= reference.INT4_ZERO if zero is None else spread(zero)
    return values * spread(scale)
