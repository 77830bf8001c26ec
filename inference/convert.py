"""Converts a Hugging Face checkpoint into one set of files for each tensor-parallel rank.

    python convert.py --hf-ckpt-path /path/to/DeepSeek-V3 --save-path /path/to/DeepSeek-V3-Demo --model-parallel 16

writes, for each rank, `model{rank}-mp{N}.safetensors`, or parts `…-00001-of-0000K.safetensors` of at most 1.5 GiB (a
single larger tensor gets a part of its own), then `model-mp{N}.index.json`, the manifest (see manifest.py). FP8 weights
and their scales stay as they are, byte for byte; the MTP module is kept; config, tokenizer and chat template files come
along.

    python convert.py --verify /path/to/DeepSeek-V3-Demo

reads everything back and compares it with the manifest.

The source is read once, in the order it lies on disk, through one window of a few MiB; each rank's share of a tensor
goes straight to its place in that rank's file, so memory does not depend on the size of the checkpoint or the number
of ranks.

Nothing is readable before everything is: files carry temporary names until all are durable, and the manifest is what
makes them a checkpoint. An earlier conversion in the same directory stays readable until that very moment. A run that
was cut short is taken up by the same command: what lies in finished files is not read or written again.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli import interrupts

# isort: split
import torch
from tqdm import tqdm

from checkpoint.manifest import (
    FORMAT,
    Source,
    check_target,
    commit,
    file_mark,
    finish_pending,
    needed,
    verify_command,
    versions,
)
from checkpoint.tensorfile import Entry, Reader, Staging, Writer, small_files
from checkpoint.weights import Checkpoint, Spec, check_ranks, choose_experts, expected_tensors, warn
from core.config import ModelArgs
from core.errors import UserError
from core.files import read_json
from core.run_config import AskedLayout, ExpertLayout
from parallel.group import Group

MAX_FILE = 1536 << 20  # bytes
COPIED = re.compile(r"(generation_)?config\.json|.*token.*|chat_template.*|vocab\..*|merges\.txt|.*\.(model|tiktoken)")


@dataclass
class Share:
    """One rank's part of a tensor and the file it goes to."""

    name: str
    rank: int
    entry: Entry
    cut: tuple[tuple[int, int], ...]
    writer: Writer | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in self.cut)

    @property
    def nbytes(self) -> int:
        rows, *rest = self.shape
        return rows * self.entry.row_bytes * (rest[0] if rest else 1) // (self.entry.shape[1] if rest else 1)

    def take(self, row: int, window: torch.Tensor) -> None:
        """Writes what it wants of the rows from `row` on: uint8 (n, row_bytes)."""
        (first, last), *rest = self.cut
        low, high = max(row, first), min(row + len(window), last)
        if low >= high:
            return
        unit = self.entry.row_bytes // (self.entry.shape[1] if rest else 1)
        start, stop = (rest[0][0] * unit, rest[0][1] * unit) if rest else (0, unit)
        assert self.writer is not None
        self.writer.write(self.name, window[low - row : high - row, start:stop], (low - first) * (stop - start))


def convert(
    source: Path,
    target: Path,
    ranks: int,
    n_experts: int | None = None,
    max_file: int = MAX_FILE,
    experts: AskedLayout = "auto",
) -> None:
    """Converts `source` for that many ranks into `target`; see weights.choose_experts for `experts`.

    Raises UserError, before a byte of the target is written, for a damaged checkpoint, one that does not divide over
    the ranks, or a target that cannot take it.
    """
    checkpoint = Checkpoint(source)
    if checkpoint.kind != "hf":
        raise UserError(f"{source}: already converted; give the Hugging Face checkpoint")
    if checkpoint.args is None:
        raise UserError(f"{source / 'config.json'}: missing")
    args = checkpoint.args
    if n_experts is not None and n_experts != args.n_routed_experts:
        raise UserError(f"--n-experts is {n_experts}, but config.json says {args.n_routed_experts}")
    layout, why = choose_experts(experts, args, ranks, checkpoint.quantised)
    check_ranks(args, ranks, checkpoint.quantised, layout)
    if target.resolve() == source.resolve():
        raise UserError(f"{target}: the converted files cannot go where the checkpoint is")
    made_from = Source(source, checkpoint.files)
    entries = checkpoint.check(args)
    if args.n_mtp_layers and not checkpoint.has_mtp:
        warn(f"{source} has no MTP module, though its config names one")
    print(why, file=sys.stderr, flush=True)
    specs = expected_tensors(args, checkpoint.quantised, checkpoint.has_mtp)
    shares = list(share_out(args, entries, specs, ranks, layout))

    with Staging(target, needed) as staging:
        check_target(target, {"format": FORMAT}, read_json(source / "config.json"))
        finish_pending(staging)
        lay_out(shares, ranks, layout, max_file, staging)
        copies = [path for path in small_files(source) if COPIED.fullmatch(path.name) and path.suffix != ".py"]
        staging.resume([made_from.state, made_from.facts, versions()])
        staging.require(sum(p.stat().st_size for p in copies))
        write(shares)
        old = [path.name for path in target.glob("model*.safetensors") if re.match(rf"model\d+-mp{ranks}\D", path.name)]
        commit(staging, made_from, ranks, layout, [staging.copy(path) for path in copies], old)


def share_out(
    args: ModelArgs, entries: dict[str, Entry], specs: dict[str, Spec], ranks: int, experts: ExpertLayout
) -> Iterator[Share]:
    """What each rank gets of each tensor, in the order the tensors lie in the source."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[1].start)):
        for rank in range(ranks):
            if cut := specs[name].cut(Group(rank, ranks), args, experts):
                yield Share(name, rank, entry, cut)


def lay_out(shares: list[Share], ranks: int, experts: ExpertLayout, max_file: int, staging: Staging) -> None:
    """Gives each share its file."""
    for rank in range(ranks):
        parts: list[list[Share]] = []
        room = 0
        for share in (s for s in shares if s.rank == rank):
            need = share.nbytes + Writer.HEADER_ROOM
            if not parts or need > room:
                parts.append([])
                room = max_file - Writer.HEADER_ROOM
            parts[-1].append(share)
            room -= need
        for i, part in enumerate(parts):
            name = f"model{rank}-mp{ranks}" + (f"-{i + 1:05}-of-{len(parts):05}" if len(parts) > 1 else "")
            tensors = {share.name: (share.entry.dtype, share.shape) for share in part}
            writer = staging.writer(f"{name}.safetensors", tensors, file_mark(rank, ranks, experts))
            for share in part:
                share.writer = writer


def write(shares: list[Share]) -> None:
    """Reads each source tensor once and gives every rank its share of it, but for those in files that are finished."""
    total = sum(share.nbytes for share in shares)
    missing = [share for share in shares if share.writer and share.writer.missing]
    done = total - sum(share.nbytes for share in missing)
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="converting") as bar, Reader() as reader:
        for _, group in itertools.groupby(missing, key=lambda share: share.name):
            takers = list(group)
            for row, window in reader.rows(takers[0].entry):
                for share in takers:
                    share.take(row, window)
            bar.update(sum(share.nbytes for share in takers))


def main() -> int:
    interrupts.heed()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hf-ckpt-path", type=Path, help="directory of the Hugging Face checkpoint")
    parser.add_argument("--save-path", type=Path, help="directory for the converted files")
    parser.add_argument("--n-experts", type=int, help="number of routed experts, checked against config.json")
    parser.add_argument("--model-parallel", type=int, help="number of ranks")
    parser.add_argument(
        "--experts",
        choices=("auto", "whole", "split"),
        default="auto",
        help="a rank gets some routed experts whole, or a share of each (default: split where their width divides)",
    )
    parser.add_argument("--verify", type=Path, metavar="DIR", help="instead: compare a directory with its manifest")
    options = parser.parse_args()
    wanted = (options.hf_ckpt_path, options.save_path, options.model_parallel)
    if sum(value is not None for value in wanted) != (len(wanted) if options.verify is None else 0):
        parser.error("give --hf-ckpt-path, --save-path and --model-parallel, or --verify alone")
    try:
        if options.verify:
            return verify_command(options.verify)
        convert(*wanted, options.n_experts, experts=options.experts)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
