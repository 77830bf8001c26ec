"""A Hugging Face checkpoint converted into files for each tensor-parallel rank, byte for byte; of a pipeline's stages
each rank's files hold the layers alone."""

import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.directory import choose_args
from checkpoint.manifest import FORMAT, file_mark
from checkpoint.partition import Partition, Ranges
from checkpoint.reading import Reader
from checkpoint.table import quantised_rows
from checkpoint.transform import NewCheckpoint, Output, OutputFile, open_source, small_files, write_checkpoint
from checkpoint.writing import Writer
from core.errors import UserError, warn
from core.files import read_json
from core.run_config import AskedLayout
from core.stages import describe_stages, divide

MAX_FILE = 1536 << 20  # bytes
COPIED = re.compile(
    r"(generation_)?config\.json|.*token.*|chat_template.*|example_prompts\.txt|vocab\..*|merges\.txt|.*\.(model|tiktoken)"
)


@dataclass(slots=True)
class Slice(Output):
    """One rank's part of a tensor."""

    cut: Ranges

    def begin(self, reader: Reader) -> Callable[[int, torch.Tensor], None]:
        return self._write

    def _write(self, row: int, window: torch.Tensor) -> None:
        (first, last), *rest = self.cut
        low, high = max(row, first), min(row + len(window), last)
        if low >= high:
            return
        unit = self.source.row_bytes // (self.source.shape[1] if rest else 1)
        start, stop = (rest[0][0] * unit, rest[0][1] * unit) if rest else (0, unit)
        self.put(window[low - row : high - row, start:stop], (low - first) * (stop - start))


def convert(
    source: Path,
    target: Path,
    ranks: int,
    n_experts: int | None = None,
    max_file: int = MAX_FILE,
    experts: AskedLayout = "auto",
    n_stages: int = 1,
    layers: str | None = None,
) -> None:
    """Converts `source` for that many ranks, of each of `n_stages` stages, into files of at most `max_file` bytes in
    `target`.

    `n_experts` is compared with the config; `experts` is as in partition.choose_experts, `layers` as in stages.divide.
    A tensor that two stages need, an embedding, is in the first one's files. Raises UserError, before anything is
    written to the target, for a damaged checkpoint, one that does not divide over the ranks or the stages, or a target
    that cannot be written to.
    """
    checkpoint, state = open_source(source, target)
    args = choose_args(checkpoint, None)
    if n_experts is not None and n_experts != args.n_routed_experts:
        raise UserError(f"--n-experts is {n_experts}, but config.json says {args.n_routed_experts}")
    specs = checkpoint.expected(args)
    partition = checkpoint.partition(args, ranks, experts, quantised_rows(specs))
    stages = divide(args, n_stages, layers, args.n_mtp_layers > 0 and checkpoint.has_mtp, "--pipeline-parallel")
    entries = checkpoint.check(Partition(args))
    if args.n_mtp_layers and not checkpoint.has_mtp:
        warn(f"{source} has no MTP module, though its config names one")
    print(partition.reason, file=sys.stderr, flush=True)
    if n_stages > 1:
        print(describe_stages(stages, ranks), file=sys.stderr, flush=True)
    in_order = sorted(entries.items(), key=lambda item: (item[1].file, item[1].start))
    files: list[OutputFile] = []
    for rank, number in itertools.product(range(ranks), range(n_stages)):
        slices: list[Output] = []
        for name, entry in in_order:
            if stages[number].files_have(name) and (cut := partition.cut(specs[name], rank)):
                slices.append(Slice(name, entry, entry.dtype, tuple(b - a for a, b in cut), cut))
        stage = number if n_stages > 1 else None
        mark = file_mark(rank, ranks, partition.experts, stage)
        parts = split_by_size(slices, max_file)
        for i, part in enumerate(parts):
            name = f"model{rank}-mp{ranks}" + ("" if stage is None else f"-pp{stage}")
            name += f"-{i + 1:05}-of-{len(parts):05}" if len(parts) > 1 else ""
            files.append(OutputFile(f"{name}.safetensors", mark, part))
    copies = [path for path in small_files(source) if COPIED.fullmatch(path.name) and path.suffix != ".py"]
    config = read_json(source / "config.json")
    counts = [len(stage.layers) for stage in stages] if n_stages > 1 else []
    new = NewCheckpoint(files, config, copies, FORMAT, ranks=ranks, experts=partition.experts, stages=counts)
    write_checkpoint(new, state, target, "converting")


def split_by_size(outputs: list[Output], max_file: int) -> list[list[Output]]:
    """Groups tensors, in order, into files of at most `max_file` bytes; a larger tensor gets a file of its own."""
    parts: list[list[Output]] = []
    room = 0
    for output in outputs:
        need = output.nbytes + Writer.HEADER_ROOM
        if not parts or need > room:
            parts.append([])
            room = max_file - Writer.HEADER_ROOM
        parts[-1].append(output)
        room -= need
    return parts
