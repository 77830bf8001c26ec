"""Manifests: the record, byte for byte, of a directory that convert.py, fp8_cast_bf16.py or quantize.py wrote.

A manifest is a JSON file. Its appearance makes a directory a checkpoint. Its fields:

    format, version   `deepseek-v3-ranks` (convert.py, `model-mp{N}.index.json`, with the number of `ranks` and the
                      layout of the routed `experts` and, of files that are cut into the stages of a pipeline too, the
                      number of layers of each in `stages`), or `deepseek-v3-bf16` (fp8_cast_bf16.py) or
                      `deepseek-v3-quantized` (quantize.py), both `model.safetensors.manifest.json`
    written_by        versions of this program, torch and safetensors
    source            `config_sha256`, and `manifest_sha256` of a source with a manifest, else `headers_sha256`: of each
                      weight file its name, size and header, then of the index (see commit.hash_headers)
    small             `bytes` and `sha256` of files that are not weights
    files             of weight files `bytes`, `sha256` as sha256sum prints it, the `rank` each is for (of a stage, and
                      which `stage`), and of each of its `tensors` CRC-32 and SHA-256 of the bytes, "crc32 sha256". A
                      load checks sizes and CRC-32

While a commit is pending, the manifest has the prefix `.pending-`: its files count, under temporary names where they do
not have their own yet, and files of the checkpoint that it replaces may still be there (see commit.py).
"""

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tqdm import tqdm

from checkpoint.atomic import PENDING, TEMPORARY
from checkpoint.partition import choose_files
from checkpoint.reading import Entry, hash_file
from core.errors import CheckpointError, UserError
from core.files import missing, read_json, require_folder, stand_in
from core.run_config import ExpertLayout

FORMAT, VERSION = "deepseek-v3-ranks", 2  # in converted files' metadata; a reader refuses a version it does not know
HF_FORMATS = {"deepseek-v3-bf16": "fp8_cast_bf16", "deepseek-v3-quantized": "quantize"}  # and the commands behind them
WRITERS = "convert.py, fp8_cast_bf16.py and quantize.py"
HF_INDEX = "model.safetensors.index.json"
HF_MANIFEST = "model.safetensors.manifest.json"


def manifest_name(ranks: int | None) -> str:
    """`ranks` None: the name of that of whole tensors, which any number of ranks can load."""
    return HF_MANIFEST if ranks is None else f"model-mp{ranks}.index.json"


def hf_mark(format: str) -> dict[str, str]:
    """The safetensors metadata of a file of one of HF_FORMATS; "pt" is for transformers."""
    return {"format": "pt", "written_by": HF_FORMATS[format]}


def file_mark(rank: int, ranks: int, experts: ExpertLayout, stage: int | None = None) -> dict[str, str]:
    """The safetensors metadata of a converted file; `stage`: the one it is for, if there are several."""
    mark = {"format": FORMAT, "version": str(VERSION), "rank": str(rank), "ranks": str(ranks), "experts": experts}
    return mark | ({} if stage is None else {"stage": str(stage)})


class Manifest:
    """A manifest that was read. Its files are complete and durable."""

    def __init__(self, folder: Path, ranks: int | None):
        """Raises UserError for one that is damaged or of another version."""
        self.folder, self.ranks = folder, ranks
        name = manifest_name(ranks)
        self.pending = (folder / (PENDING + name)).exists()
        self.path = folder / (PENDING + name if self.pending else name)
        self.raw = raw = read_json(self.path)
        known = list(HF_FORMATS) if ranks is None else [FORMAT]
        if raw.get("format") not in known or raw.get("version") != VERSION:
            reads, found = " or ".join(map(repr, known)), f"{raw.get('format')!r} version {raw.get('version')!r}"
            raise UserError(f"{self.path}: this program reads {reads} version {VERSION}, not {found}: convert again")
        self.command = "convert.py" if ranks else f"{HF_FORMATS[raw['format']]}.py"
        if raw.get("pending"):  # as commits were marked before
            old = "an earlier version of this program was interrupted here"
            raise UserError(f"{self.path}: {old}; convert again, into an empty directory")
        self.files: dict[str, dict[str, Any]] = raw.get("files", {})
        self.small: dict[str, dict[str, Any]] = raw.get("small", {})
        self.experts: ExpertLayout = raw.get("experts", "whole")
        self.stages: list[int] = raw.get("stages", [])  # the layers of each, if there are several
        if not self._is_well_formed():
            raise CheckpointError(f"{self.path}: damaged; copy the directory again or convert again", self.path)
        for file in self.files:
            check_file_name(self.path, "files", file)

    def _is_well_formed(self) -> bool:
        try:
            places = {(record.get("rank"), record.get("stage")) for record in self.files.values()}
            stages = range(len(self.stages)) if self.stages else [None]
            layers = all(type(n) is int and n > 0 for n in self.stages)
            records = [*self.files.values(), *self.small.values()]
            digests = [text for record in self.files.values() for text in record["tensors"].values()]
            hashes = all(type(record["bytes"]) is int and len(record["sha256"]) == 64 for record in records)
            hashes = hashes and all(len(text) == 73 for text in digests)
        except (AttributeError, KeyError, TypeError):
            return False
        names = not any("/" in name or name == ".." for name in self.small)
        layout = self.raw.get("ranks") == self.ranks and self.experts in get_args(ExpertLayout)
        ranks = [None] if self.ranks is None else range(self.ranks)
        return hashes and names and layout and layers and places == set(itertools.product(ranks, stages))

    def where(self, file: str) -> Path:
        """The path of one of its files, which may have a temporary name while the commit is pending."""
        temporary = self.folder / (TEMPORARY + file)
        return temporary if self.pending and temporary.exists() else self.folder / file

    def replaces(self, file: str) -> bool:
        """Whether a weight file of the folder belongs to the checkpoint that this one, while pending, replaces."""
        same_ranks = self.ranks is None or re.match(rf"model\d+-mp{self.ranks}\D", file)
        return self.pending and bool(same_ranks) and file not in self.files

    def mark(self, file: str) -> dict[str, str]:
        """The metadata of one of its files."""
        if self.ranks is None:
            return hf_mark(self.raw["format"])
        record = self.files[file]
        return file_mark(record["rank"], self.ranks, self.experts, record.get("stage"))

    def check_sizes(self) -> None:
        """Raises CheckpointError when a weight file is missing or has another size than it was written with."""
        for file, record in self.files.items():
            path = self.where(file)
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, but {self.path.name} names it", path)
            if (size := path.stat().st_size) != record["bytes"]:
                text = f"{path}: expected {record['bytes']} bytes, found {size}"
                raise CheckpointError(text, path, "", f"{record['bytes']} bytes", f"{size} bytes")

    def entries(
        self, rank: int | None, header: Callable[[str, Path], tuple[dict[str, str], dict[str, Entry]]]
    ) -> dict[str, Entry]:
        """A rank's tensors, of all stages. Raises CheckpointError when a file, of any rank, is missing or not as the
        manifest says."""
        self.check_sizes()
        found: dict[str, Entry] = {}
        for file, record in self.files.items():
            if record.get("rank") != rank:
                continue
            path = self.where(file)
            metadata, tensors = header(file, path)
            wanted = self.mark(file)
            if (mark := {key: metadata.get(key) for key in wanted}) != wanted:
                of = f", stage {record['stage']} of {len(self.stages)}" if self.stages else ""
                what = f"rank {rank} of {self.ranks}{of}, {self.experts} experts"
                what = f"written by {self.command}" if rank is None else what
                text = f"{path}: its metadata does not mark it as {what}: found {mark}"
                raise CheckpointError(text, path, "", wanted, mark)
            if tensors.keys() != record["tensors"].keys():
                name = sorted(tensors.keys() ^ record["tensors"].keys())[0]
                verb = "does not name it" if name in tensors else "names it, but the file lacks it"
                raise CheckpointError(f"{path}: {name}: {self.path.name} {verb}", path, name)
            found |= {name: replace(entry, crc=record["tensors"][name][:8]) for name, entry in tensors.items()}
        return found


def read_manifests(folder: Path) -> dict[int | None, Manifest]:
    """All manifests of a directory by number of ranks (None: of whole tensors). Raises UserError for a damaged one."""
    require_folder(folder)
    try:
        return {ranks: Manifest(folder, ranks) for ranks in manifests_in(folder)}
    except UserError:  # a pending one may have taken its final name between two looks at the directory
        return {ranks: Manifest(folder, ranks) for ranks in manifests_in(folder)}


def changed_files(manifests: Iterable[Manifest]) -> list[str]:
    """A sentence for each file, other than weights, whose size is none that a directory's manifests have: a user may
    have edited it."""
    written: dict[Path, list[int]] = {}
    for manifest in manifests:
        for name, record in manifest.small.items():
            written.setdefault(manifest.where(name), []).append(record["bytes"])
    now = {path: path.stat().st_size for path in written if path.is_file()}
    return [f"{path} was changed: {written[path][-1]} bytes were written, now it has {size}"
            for path, size in now.items() if size not in written[path]]  # fmt: skip


def manifests_in(folder: Path) -> list[int | None]:
    """The numbers of ranks (None: whole tensors) that the directory has manifests for, by their names alone."""
    names = {path.name.removeprefix(PENDING) for path in folder.iterdir()}
    ranks = sorted(int(m[1]) for name in names if (m := re.fullmatch(r"model-mp([1-9]\d*)\.index\.json", name)))
    return [*([None] if HF_MANIFEST in names else []), *ranks]


def check_file_name(index: Path, what: str, file: Any) -> None:
    """Raises CheckpointError unless an index names a plain file of its own directory (which may be a link, as in
    Hugging Face's cache)."""
    plain = isinstance(file, str) and file.endswith(".safetensors") and not re.search(r"[/\\]", file)
    if not plain or file.startswith(".") or not file.isprintable() or not what.isprintable():
        what = what if what.isprintable() else repr(what)
        text = f"{index}: {what}: {file!r} is not the plain name of a .safetensors file"
        raise CheckpointError(text, index, what, "the plain name of a .safetensors file", file)


# --------------------------------------------------------------------------------------------------------------------
# Verification
# --------------------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A file or tensor that is not as its manifest says."""

    file: Path
    tensor: str | None
    problem: str  # what was expected and what was found

    def __str__(self) -> str:
        return f"{self.file}: {f'{self.tensor}: ' if self.tensor else ''}{self.problem}"


def verify(folder: Path, progress: Callable[[int], object] = lambda _: None) -> Iterator[Difference]:
    """Reads everything in a directory that has manifests, in bounded memory, and yields each difference from them.

    Calls `progress` with the number of bytes after each read. Raises UserError where there is no manifest, or a damaged
    one.
    """
    manifests = read_manifests(folder)
    if not manifests:
        raise UserError(f"{folder}: no manifest, so nothing to compare with: {WRITERS} write one")
    for path in sorted(folder.glob("*.safetensors")):
        known = any(path.name in manifest.files or manifest.replaces(path.name) for manifest in manifests.values())
        if not known and not path.name.startswith("."):
            yield Difference(path, None, "expected no such file, found one that no manifest names")
    for manifest in manifests.values():
        for file in (*manifest.small, *manifest.files):
            yield from verify_file(manifest, file, progress)


def verify_file(
    manifest: Manifest, file: str, progress: Callable[[int], object] = lambda _: None
) -> Iterator[Difference]:
    """The same for one of the manifest's files: each tensor that differs, otherwise the file if its bytes differ."""
    path = manifest.where(file)
    wanted = manifest.files.get(file) or manifest.small[file]
    if not path.is_file():
        text = str(missing(path, f"expected {wanted['bytes']} bytes, found no such file"))
        yield Difference(path, None, text.removeprefix(f"{path}: "))
        return
    if (size := path.stat().st_size) != wanted["bytes"]:
        text = str(stand_in(path) or f"expected {wanted['bytes']} bytes, found {size}")
        yield Difference(path, None, text.removeprefix(f"{path}: "))
        return
    try:
        found: dict[str, Any] = hash_file(path, progress) if file in manifest.files else {"sha256": sha256_of(path)}
    except UserError as e:
        yield Difference(path, None, str(e).removeprefix(f"{path}: "))
        return
    held = found.get("tensors", {})
    bad = 0
    for name, digest in wanted.get("tensors", {}).items():
        if held.get(name) != digest:
            bad += 1
            now = held.get(name, "no such tensor")
            yield Difference(path, name, f"expected CRC32 and SHA-256 {digest}, found {now}")
    if not bad and found["sha256"] != wanted["sha256"]:
        where = "header: " if held else ""
        yield Difference(path, None, f"{where}expected SHA-256 {wanted['sha256']}, found {found['sha256']}")


def verify_command(folder: Path) -> int:
    """Verifies a directory with a progress bar and prints each difference. Returns the exit status: 1 if there are any.
    Raises UserError as `verify` does."""
    files = [record for manifest in read_manifests(folder).values() for record in manifest.files.values()]
    total = sum(record["bytes"] for record in files)
    bad = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying") as bar:
        for difference in verify(folder, bar.update):
            bar.clear()
            print(difference, flush=True)
            bad += 1
    outcome = f"{bad} difference{'s' * (bad > 1)} from what was written" if bad else "all as it was written"
    print(f"{folder}: {len(files)} weight files, {total / 1e9:.2f} GB: {outcome}", file=sys.stderr, flush=True)
    return 1 if bad else 0


def require_hashes(folder: Path, ranks: int, share: tuple[int, int], progress: bool = True, lanes: int = 1) -> None:
    """Verifies, before a load for that many ranks in so many lanes, every n-th file from the i-th on, where `share` is
    (i, n), so that the ranks of a host divide the work; none where all files are for other ranks, which a load
    refuses. Raises UserError with the first difference, or where there is no manifest."""
    manifests = read_manifests(folder)
    manifest = manifests.get(choose_files([n for n in manifests if n], ranks, lanes)) or manifests.get(None)
    if manifest is None and manifests:
        return  # files for other ranks: Checkpoint.made_for says which
    if manifest is None:
        raise UserError(f"{folder}: --verify needs the manifest that {WRITERS} write")
    files = [*manifest.files, *manifest.small][share[0] :: share[1]]
    total = sum(manifest.files[file]["bytes"] for file in files if file in manifest.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=not progress or None) as bar:
        for file in files:
            for difference in verify_file(manifest, file, bar.update):
                raise UserError(str(difference))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
