"""Everything that can be found wrong with a checkpoint: its index, files and tensors against each other and the config,
every value, the tokenizer and the chat template.

The rules on headers are the loader's own (see directory.py). Checks of values read all bytes (see check_values.py). All
faults are reported, not only the first.
"""

import os
import time
from pathlib import Path

from checkpoint.check_text import check_text
from checkpoint.check_values import check_values
from checkpoint.directory import Checkpoint, choose_args
from checkpoint.reading import Entry, read_header, require_equal
from checkpoint.report import Report
from checkpoint.unsupported import require_checkpoint
from core.config import ModelArgs
from core.errors import CheckWarning, UserError

Rank = tuple[int, int]  # number, of how many

KINDS = {"hf": "Hugging Face", "converted": "converted", "upstream": "converted by the V3 repository"}


def check(path: Path, quick: bool = False, config: Path | None = None) -> Report:
    """Checks a checkpoint; `quick` reads headers alone, no weights. `config` is for a directory that has none.

    Raises UserError for wrong use: no such directory, or a config that is missing or cannot be read.
    """
    start = time.perf_counter()
    require_checkpoint(path)
    report = Report(path)
    checkpoint, args = open_checkpoint(path, config, report)
    parts = {} if checkpoint is None else read_headers(checkpoint, args, report)
    entries = {(e.file, e.name, e.part): e for part in parts.values() for e in part.values()}
    if checkpoint is not None and not quick:
        check_values(list(entries.values()), args, report)
        with report.checking("weights"):
            for problem in checkpoint.contradictory_values(0, 1):  # which whole tensors alone can have
                report.add(problem)
        check_copies(parts, checkpoint, args, report)
    check_text(path, args, report)
    names = {(file, name) for file, name, _ in entries}
    report.subject = {
        "kind": KINDS[checkpoint.kind] if checkpoint is not None else "no checkpoint that can be told",
        "quick": quick, "files": len({file for file, _ in names}), "tensors": len(names),
        "bytes": sum(e.nbytes for e in entries.values()), "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip
    return report


def open_checkpoint(path: Path, config: Path | None, report: Report) -> tuple[Checkpoint | None, ModelArgs | None]:
    """The checkpoint, None if its kind cannot be told, and its config, None if it is damaged."""
    checkpoint: Checkpoint | None = None
    with report.checking("files"):
        checkpoint = Checkpoint(path, report.add)
        if checkpoint.kind == "hf":
            checkpoint.on_disk(1)  # what is wrong with files is said before the config is compared with them
    if checkpoint is None:
        for file in sorted(path.glob("*.safetensors")):
            with report.checking("files"):
                read_header(file)
        return None, None
    if checkpoint.kind == "upstream" and config is None and checkpoint.args is None:
        raise UserError(f"{path} has no config.json; name its model with --config configs/…")
    args: ModelArgs | None = None
    with report.checking("config"):
        if checkpoint.args is not None or not os.path.lexists(path / "config.json"):
            args = choose_args(checkpoint, config)
    for text in args.warnings if args is not None else ():
        report.add(CheckWarning(text, path / "config.json"))
    if args is not None:
        report.cover("config", f"{args.n_layers} layers, {args.n_routed_experts} experts, {args.dtype}")
    return checkpoint, args


def describe_links(path: Path) -> str:
    """Where a directory's links lead, in words: a checkpoint may lie in a store that others share."""
    homes = {os.path.dirname(os.path.realpath(file)) for file in path.iterdir() if file.is_symlink()}
    shown = [home if home.isprintable() else repr(home) for home in sorted(homes)[:3]]
    more = f" and {len(homes) - 3} more directories" if len(homes) > 3 else ""
    return f"; links into {', '.join(shown)}{more}" if homes else ""


def read_headers(checkpoint: Checkpoint, args: ModelArgs | None, report: Report) -> dict[Rank, dict[str, Entry]]:
    """Each rank's tensors: those that match the config by our names, the others by the files' own names."""
    parts: dict[Rank, dict[str, Entry]] = {}
    for size in checkpoint.ranks or (1,):
        # rank 0 reports ranks without a file; while a commit is pending, only the manifest knows the files
        for rank in range(size if checkpoint.manifests else min(size, max(1, len(checkpoint.files)))):
            with report.checking("files"):
                on_disk = checkpoint.on_disk(rank, size)
                parts[rank, size] = {name: entry for name, entry in on_disk.items() if not checkpoint.ignores(entry)}
            if args is None or (rank, size) not in parts:
                continue
            with report.checking("tensors"):
                found = checkpoint.match(checkpoint.partition(args, size), rank)
                known = {entry.name for entry in found.values()}
                others = {name: e for name, e in parts[rank, size].items() if e.name not in known}
                parts[rank, size] = found | others
    with report.checking("tensors"):
        if args is not None and args.n_mtp_layers and not checkpoint.has_mtp and checkpoint.kind != "upstream":
            raise CheckWarning(f"{checkpoint.path}: no MTP module, though its config names one", checkpoint.path)
    listed = {file for manifest in checkpoint.manifests.values() for file in manifest.files}
    count = len(listed or checkpoint.files)
    report.cover("files", f"{count:,} files: index, names, headers{describe_links(checkpoint.path)}", count)
    if args is not None:
        count = sum(map(len, parts.values()))
        report.cover("tensors", f"{count:,} tensors: names, shapes and dtypes as the config has them", count)
    return parts


def check_copies(
    parts: dict[Rank, dict[str, Entry]], checkpoint: Checkpoint, args: ModelArgs | None, report: Report
) -> None:
    """Compares tensors that are stored more than once: the MTP module's embedding and head, and those that every rank
    has whole."""
    if args is None:
        return
    whole = {name for name, spec in checkpoint.expected(args).items() if spec.split is None}
    pairs: list[tuple[Entry, Entry]] = []
    for (rank, size), part in parts.items():
        if args.tie_word_embeddings and "embed.weight" in part and "head.weight" in part:
            pairs.append((part["embed.weight"], part["head.weight"]))
        for name in ("embed.weight", "head.weight"):
            main = part.get(name) or part.get("embed.weight")  # a tied head is the embedding
            if main is not None and (copy := part.get(f"mtp.0.{name}")) is not None:
                pairs.append((main, copy))
        if rank:
            first = parts.get((0, size), {})
            pairs += [(first[name], part[name]) for name in sorted(whole & part.keys() & first.keys())]
    for main, copy in pairs:
        with report.checking("copies"):
            require_equal(main, copy)
    report.cover("copies", f"{len(pairs):,} pairs of equal tensors", len(pairs))
