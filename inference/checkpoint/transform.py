"""A new checkpoint written from a Hugging Face one, in bounded memory: what conversion, cast and quantising share.

Each source tensor is read once, in the order it lies on disk, in windows of a few MiB. Each tensor that is made of it
takes its rows from the window, transforms them, and writes them to their place in its file, so memory depends neither
on the size of the checkpoint nor on the number of files.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from checkpoint.atomic import AtomicWriter
from checkpoint.commit import Source, check_target, commit, finish_pending, versions
from checkpoint.directory import Checkpoint
from checkpoint.manifest import FORMAT, HF_INDEX, HF_MANIFEST, hf_mark
from checkpoint.reading import Entry, Reader
from checkpoint.writing import Writer
from core.errors import UserError, warn
from core.files import read_json
from core.run_config import ExpertLayout


@dataclass(slots=True)
class Output:
    """A tensor to write and the one it is made of. Subclasses say how, and may write others beside it."""

    name: str
    source: Entry
    dtype: torch.dtype
    shape: tuple[int, ...]
    writer: Writer | None = field(default=None, init=False)
    step: ClassVar[int] = 1  # all windows but the last have a multiple of that many rows

    @property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """All that it writes, in order, by name."""
        return {self.name: (self.dtype, self.shape)}

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())

    def begin(self, reader: Reader) -> Callable[[int, torch.Tensor], None]:
        """Reads what is needed besides the source's rows, and returns the function that writes the tensor: it is called
        with windows in order, each the number of its first row and uint8 (n, bytes of a row)."""
        raise NotImplementedError

    def put(self, data: torch.Tensor, at: int, name: str | None = None) -> None:
        """Writes data from byte `at` of the tensor on, or of the one of that name."""
        assert self.writer is not None
        self.writer.write(name or self.name, data, at)


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
    format: str  # of its manifest
    texts: dict[str, Any] = field(default_factory=dict)  # JSON files by name
    ranks: int | None = None  # that it is cut for; None: any number can load it
    experts: ExpertLayout = "whole"
    stages: Sequence[int] = ()  # the layers of each, if its files are cut into several
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


def hf_checkpoint(
    outputs: Iterable[Output], config: dict[str, Any], source: Path, format: str, options: Sequence[Any]
) -> NewCheckpoint:
    """A Hugging Face checkpoint of these tensors, in files that are named as their sources' are, with all else that is
    in the directory `source`. `config` is its config.json, `format` its manifest's."""
    files: dict[str, list[Output]] = {}
    for output in outputs:
        files.setdefault(output.source.file.name, []).append(output)
    new = [OutputFile(file, hf_mark(format), outputs) for file, outputs in sorted(files.items())]
    texts = {"config.json": config}
    if [file.name for file in new] != ["model.safetensors"]:
        weight_map = {name: file.name for file in new for output in file.outputs for name in output.tensors}
        total = sum(output.nbytes for file in new for output in file.outputs)
        texts[HF_INDEX] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    copies = [path for path in small_files(source) if path.name != "config.json"]
    return NewCheckpoint(new, config, copies, format, texts, options=options)


def plain_config(source: Path) -> dict[str, Any]:
    """The config.json of a checkpoint in its form without quantised weights."""
    config = read_json(source / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    if "dtype" not in config:  # as transformers 5 spells it
        config["torch_dtype"] = "bfloat16"
    return config


def write_checkpoint(new: NewCheckpoint, source: Source, target: Path, verb: str) -> None:
    """Writes a checkpoint to `target`, where it appears as a whole, or resumes a run of the same job that was cut
    short. `verb` labels the progress bar.

    Raises UserError for a target that cannot be written to, is too small, or holds something else.
    """
    with AtomicWriter(target) as out:
        check_target(target, {"format": FORMAT} if new.format == FORMAT else hf_mark(new.format), new.config)
        finish_pending(out, new.ranks)
        for file in new.files:
            tensors = {name: tensor for output in file.outputs for name, tensor in output.tensors.items()}
            writer = out.writer(file.name, tensors, file.metadata)
            for output in file.outputs:
                output.writer = writer
        out.start([source.state, source.hashes, versions(), *new.options])
        out.require_space(sum(path.stat().st_size for path in new.copies))
        write_outputs([output for file in new.files for output in file.outputs], verb)
        for path in new.copies:
            out.copy(path)
        for name, value in new.texts.items():
            out.write_json(name, value)
        small = [*(path.name for path in new.copies), *new.texts]
        layout: dict[str, Any] = {} if new.ranks is None else {"ranks": new.ranks, "experts": new.experts}
        layout |= {"stages": list(new.stages)} if new.stages else {}
        commit(out, source, new.format, new.ranks, layout, small)


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
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    lists = (".index.json", HF_MANIFEST)
    found = (p for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(weights + lists))
    return sorted(p for p in found if p.is_file())
