"""A new checkpoint written from a Hugging Face one, in bounded memory: the part that conversion and cast share.

Each source tensor is read once, in the order it lies on disk, in windows of a few MiB. Each tensor that is made of it
takes its rows from the window, transforms them, and writes them to their place in its file, so memory depends neither
on the size of the checkpoint nor on the number of files.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from checkpoint.atomic import AtomicWriter
from checkpoint.commit import Source, check_target, commit, finish_pending, versions
from checkpoint.directory import Checkpoint
from checkpoint.manifest import CAST_MARK, FORMAT
from checkpoint.reading import Entry, Reader
from checkpoint.writing import Writer
from core.errors import UserError, warn
from core.run_config import ExpertLayout


@dataclass(slots=True)
class Output:
    """A tensor to write and the one it is made of. Subclasses say how."""

    name: str
    source: Entry
    dtype: torch.dtype
    shape: tuple[int, ...]
    writer: Writer | None = field(default=None, init=False)
    step: ClassVar[int] = 1  # all windows but the last have a multiple of that many rows

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def begin(self, reader: Reader) -> Callable[[int, torch.Tensor], None]:
        """Reads what is needed besides the source's rows, and returns the function that writes the tensor: it is called
        with windows in order, each the number of its first row and uint8 (n, bytes of a row)."""
        raise NotImplementedError

    def put(self, data: torch.Tensor, at: int) -> None:
        """Writes data from byte `at` of the tensor on."""
        assert self.writer is not None
        self.writer.write(self.name, data, at)


@dataclass
class OutputFile:
    name: str
    metadata: dict[str, str]
    outputs: list[Output]


@dataclass
class NewCheckpoint:
    """All that is written to a directory."""

    files: list[OutputFile]
    config: dict[str, Any]  # its config.json, which a config.json in the directory must equal
    copies: list[Path]  # files that come along from the source
    texts: dict[str, Any] = field(default_factory=dict)  # JSON files by name
    ranks: int | None = None  # that it is cut for; None: any number can load it
    experts: ExpertLayout = "whole"
    options: Sequence[Any] = ()  # JSON of what determines the bytes besides the source and the files' headers


def open_source(source: Path, target: Path) -> tuple[Checkpoint, Source]:
    """The checkpoint to read. Raises UserError unless it is a Hugging Face one with a config, elsewhere than the
    target."""
    checkpoint = Checkpoint(source)
    if checkpoint.kind != "hf":
        raise UserError(f"{source}: already converted for ranks; give the Hugging Face checkpoint")
    if checkpoint.args is None:
        raise UserError(f"{source / 'config.json'}: missing")
    for text in checkpoint.args.warnings:
        warn(text)
    if target.resolve() == source.resolve():
        raise UserError(f"{target}: the output cannot go where the checkpoint is")
    return checkpoint, Source(source, checkpoint.files)


def write_checkpoint(new: NewCheckpoint, source: Source, target: Path, verb: str) -> None:
    """Writes a checkpoint to `target`, where it appears as a whole, or resumes a run of the same job that was cut
    short. `verb` labels the progress bar.

    Raises UserError for a target that cannot be written to, is too small, or holds something else.
    """
    with AtomicWriter(target) as out:
        check_target(target, CAST_MARK if new.ranks is None else {"format": FORMAT}, new.config)
        finish_pending(out, new.ranks)
        for file in new.files:
            writer = out.writer(file.name, {o.name: (o.dtype, o.shape) for o in file.outputs}, file.metadata)
            for output in file.outputs:
                output.writer = writer
        out.start([source.state, source.hashes, versions(), *new.options])
        out.require_space(sum(path.stat().st_size for path in new.copies))
        write_outputs([output for file in new.files for output in file.outputs], verb)
        for path in new.copies:
            out.copy(path)
        for name, value in new.texts.items():
            out.write_json(name, value)
        commit(out, source, new.ranks, new.experts, [*(path.name for path in new.copies), *new.texts])


def write_outputs(outputs: list[Output], verb: str) -> None:
    """Reads each source tensor once and writes all that is made of it, except to files that are finished."""
    outputs = sorted(outputs, key=lambda o: (o.source.file, o.source.start))
    unwritten = [o for o in outputs if o.writer and o.writer.unwritten]
    total, left = (sum(entry.nbytes for entry in {o.source for o in some}) for some in (outputs, unwritten))
    bar = tqdm(total=total, initial=total - left, unit="B", unit_scale=True, desc=verb)
    with bar, Reader() as reader, Reader() as scales:
        for source, group in itertools.groupby(unwritten, key=lambda o: o.source):
            targets = list(group)
            writes = [output.begin(scales) for output in targets]
            for row, window in reader.rows(source, step=max(o.step for o in targets)):
                for write in writes:
                    write(row, window)
                bar.update(window.numel())


def small_files(folder: Path) -> list[Path]:
    """The regular files of a checkpoint's folder that are not weights: tokenizer, templates, licences, code."""
    weights = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    found = (p for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(weights))
    return sorted(p for p in found if p.is_file())
