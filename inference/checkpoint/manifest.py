"""Manifests: what a directory that convert.py or fp8_cast_bf16.py wrote must hold, byte for byte.

A manifest is a JSON file, written last: with it a directory is a checkpoint, without it nothing. Its fields:

    format, version   `deepseek-v3-ranks` (convert.py, `model-mp{N}.index.json`, with the number of `ranks` and the
                      layout of the routed `experts`), or `deepseek-v3-bf16` (the cast's,
                      `model.safetensors.manifest.json`)
    written_by        versions of this program, torch and safetensors
    source            `config_sha256`, and `manifest_sha256` of a source with a manifest, else `headers_sha256`: of each
                      weight file its name, size and header, then of the index (see hash_headers)
    small             `bytes` and `sha256` of files that are not weights
    files             of weight files `bytes`, `sha256` as sha256sum prints it, the `rank` each is for, and of its
                      `tensors` CRC32 and SHA-256 of the bytes, "crc32 sha256". A load checks sizes and CRC32
    pending           true from the moment the new files count until they all have their own names; until then
                      `obsolete` ones of an earlier checkpoint may be there
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tqdm import tqdm

from checkpoint.tensorfile import TEMPORARY, Entry, Staging, hash_file, read_header
from core.config import PROGRAM_VERSION
from core.errors import CheckpointError, UserError
from core.files import read_json, require_folder
from core.run_config import ExpertLayout

FORMAT, VERSION = "deepseek-v3-ranks", 2  # the mark in converted files; a reader refuses a version it does not know
CAST_FORMAT = "deepseek-v3-bf16"
CAST_MARK = {"format": "pt", "written_by": "fp8_cast_bf16"}  # in files of the cast; transformers asks for the first
HF_INDEX = "model.safetensors.index.json"
CAST_MANIFEST = "model.safetensors.manifest.json"


def manifest_name(ranks: int | None) -> str:
    """`ranks` None: a cast's, which any number of ranks can load."""
    return CAST_MANIFEST if ranks is None else f"model-mp{ranks}.index.json"


def file_mark(rank: int, ranks: int, experts: ExpertLayout) -> dict[str, str]:
    """The safetensors metadata of a converted file."""
    mark = {"format": FORMAT, "version": str(VERSION), "rank": str(rank), "ranks": str(ranks)}
    return mark | {"experts": experts}


class Manifest:
    """A manifest that was read. While it is `pending`, its files are complete and durable but may have temporary names
    still."""

    def __init__(self, folder: Path, ranks: int | None):
        """Raises UserError for one that is damaged or of another version."""
        self.folder, self.ranks = folder, ranks
        self.path = folder / manifest_name(ranks)
        self.raw = raw = read_json(self.path)
        format = CAST_FORMAT if ranks is None else FORMAT
        if raw.get("format") != format or raw.get("version") != VERSION:
            reads, made = f"{format!r} version {VERSION}", f"{raw.get('format')!r} version {raw.get('version')!r}"
            raise UserError(f"{self.path}: this program reads {reads}, not {made}: convert again")
        self.pending: bool = raw.get("pending") is True
        self.obsolete: list[str] = raw.get("obsolete", [])
        self.files: dict[str, dict[str, Any]] = raw.get("files", {})
        self.small: dict[str, dict[str, Any]] = raw.get("small", {})
        self.experts: ExpertLayout = raw.get("experts", "whole")
        if not self._well_formed(raw):
            raise CheckpointError(f"{self.path}: damaged; copy the directory again or convert again", self.path)
        for file in (*self.files, *(file for file in self.obsolete if file != HF_INDEX)):
            check_file_name(self.path, "files", file)

    def _well_formed(self, raw: dict[str, Any]) -> bool:
        try:
            ranks = {facts.get("rank") for facts in self.files.values()}
            facts = [*self.files.values(), *self.small.values()]
            hashes = [text for facts in self.files.values() for text in facts["tensors"].values()]
            whole = all(type(f["bytes"]) is int and len(f["sha256"]) == 64 for f in facts)
            whole = whole and all(len(text) == 73 for text in hashes)
        except (AttributeError, KeyError, TypeError):
            return False
        whole = whole and raw.get("ranks") == self.ranks and self.experts in get_args(ExpertLayout)
        whole = whole and ranks == ({None} if self.ranks is None else set(range(self.ranks)))
        return whole and isinstance(self.obsolete, list) and not any("/" in name or name == ".." for name in self.small)

    def where(self, file: str) -> Path:
        temporary = self.folder / (TEMPORARY + file)
        return temporary if self.pending and temporary.exists() else self.folder / file

    def mark(self, rank: int | None) -> dict[str, str]:
        """The metadata its files of that rank have."""
        return CAST_MARK if rank is None or self.ranks is None else file_mark(rank, self.ranks, self.experts)

    def check_sizes(self) -> None:
        """Raises UserError when a weight file is missing or has another size than it was written with."""
        for file, facts in self.files.items():
            path = self.where(file)
            if not path.is_file():
                raise CheckpointError(f"{path}: missing, but {self.path.name} names it", path)
            if (size := path.stat().st_size) != facts["bytes"]:
                text = f"{path}: expected {facts['bytes']} bytes, found {size}"
                raise CheckpointError(text, path, "", f"{facts['bytes']} bytes", f"{size} bytes")

    def changed(self) -> list[str]:
        """Sentences on the other files whose size is not what it was; a user may have edited them."""
        found = ((self.where(name), facts["bytes"]) for name, facts in self.small.items())
        sizes = [(path, wanted, path.stat().st_size) for path, wanted in found if path.is_file()]
        return [f"{path} was changed: {wanted} bytes were written, now it has {size}"
                for path, wanted, size in sizes if size != wanted]  # fmt: skip

    def entries(
        self, rank: int | None, header: Callable[[str, Path], tuple[dict[str, str], dict[str, Entry]]]
    ) -> dict[str, Entry]:
        """A rank's tensors. Raises UserError when a file, of any rank, is missing or not as the manifest has it."""
        self.check_sizes()
        found: dict[str, Entry] = {}
        for file, facts in self.files.items():
            if facts.get("rank") != rank:
                continue
            path = self.where(file)
            metadata, tensors = header(file, path)
            wanted = self.mark(rank)
            if (mark := {key: metadata.get(key) for key in wanted}) != wanted:
                what = "written by the cast" if rank is None else f"rank {rank} of {self.ranks}, {self.experts} experts"
                raise CheckpointError(
                    f"{path}: its metadata does not mark it as {what}: found {mark}", path, "", wanted, mark
                )
            if tensors.keys() != facts["tensors"].keys():
                name = sorted(tensors.keys() ^ facts["tensors"].keys())[0]
                verb = "does not name it" if name in tensors else "names it, but the file lacks it"
                raise CheckpointError(f"{path}: {name}: {self.path.name} {verb}", path, name)
            found |= {name: replace(entry, crc=facts["tensors"][name][:8]) for name, entry in tensors.items()}
        return found


def read_manifests(folder: Path) -> dict[int | None, Manifest]:
    """All manifests of a directory by number of ranks (None: a cast's). Raises UserError for a damaged one."""
    require_folder(folder)
    return {ranks: Manifest(folder, ranks) for ranks in manifests_in(folder)}


def manifests_in(folder: Path) -> list[int | None]:
    """What manifests there are, by their names."""
    names = {path.name for path in folder.iterdir()}
    ranks = sorted(int(m[1]) for name in names if (m := re.fullmatch(r"model-mp([1-9]\d*)\.index\.json", name)))
    return [*([None] if CAST_MANIFEST in names else []), *ranks]


def check_file_name(index: Path, what: str, file: Any) -> None:
    """An index may name plain files of its own directory only (which may be links, as in Hugging Face's cache)."""
    plain = isinstance(file, str) and file.endswith(".safetensors") and not re.search(r"[/\\]", file)
    if not plain or file.startswith(".") or not file.isprintable() or not what.isprintable():
        what = what if what.isprintable() else repr(what)
        text = f"{index}: {what}: {file!r} is not the plain name of a .safetensors file"
        raise CheckpointError(text, index, what, "the plain name of a .safetensors file", file)


def check_target(target: Path, mark: dict[str, str], config: dict[str, Any]) -> None:
    """Refuses a directory to write to whose weights lack the writer's mark, or belong to a model of another config."""
    for path in sorted(target.glob("*.safetensors")):
        if not path.name.startswith(TEMPORARY) and not mark.items() <= read_header(path)[0].items():
            raise UserError(f"{path}: not written by this program; choose another directory or remove it")
    path = target / "config.json"
    if path.exists() and read_json(path) != config:
        raise UserError(f"{path}: another model's; choose another directory or remove what is there")


# --------------------------------------------------------------------------------------------------------------------
# Written
# --------------------------------------------------------------------------------------------------------------------


class Source:
    """The directory a checkpoint is made from, as it is now."""

    def __init__(self, folder: Path, files: Iterable[str]):
        """`files`: those with weights. Made before any of them is read: what is wrong with them is for the checks."""
        self.folder, self.files = folder, [folder / file for file in sorted(files)]
        self.state = self._state()

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """Hashes for a manifest, once the checks have found nothing. Raises UserError for what cannot be read."""
        config = {"config_sha256": _sha256(self.folder / "config.json")}
        if (self.folder / CAST_MANIFEST).exists():
            return config | {"manifest_sha256": _sha256(self.folder / CAST_MANIFEST)}
        return config | {"headers_sha256": hash_headers(self.folder, self.files)}

    def _state(self) -> list[tuple[str, int, int]]:
        """Where its bytes really are, how many, and when they were last written."""
        found = []
        for path in (self.folder / "config.json", *self.files):
            try:
                info = path.stat()
                found.append((os.path.realpath(path), info.st_size, info.st_mtime_ns))
            except OSError:
                found.append((str(path), -1, -1))
        return found

    def check_unchanged(self) -> None:
        """Raises UserError when something has been written there since."""
        for (path, *before), (_, *now) in zip(self.state, self._state(), strict=True):
            if before != now:
                raise UserError(f"{path}: was changed while it was read; run the command again")


def hash_headers(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of what a checkpoint says of itself: for each weight file its name, a zero byte, its size in 8 bytes and
    the header with its length before it, as they lie there, then the index file's bytes."""
    sha = hashlib.sha256()
    with reading(folder):
        for path in files:
            with open(path, "rb", buffering=0) as f:
                length = f.read(8)
                sha.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little") + length)
                sha.update(f.read(int.from_bytes(length, "little")))
        if (folder / HF_INDEX).exists():
            sha.update((folder / HF_INDEX).read_bytes())
    return sha.hexdigest()


def _sha256(path: Path) -> str:
    with reading(path), open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an error of reading into one for the user; `path` where the error does not say of which file."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{e.filename or path}: cannot be read ({e.strerror})") from None


def versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "safetensors")}
    return {"program": PROGRAM_VERSION, **libraries}


def commit(
    staging: Staging,
    source: Source,
    ranks: int | None,
    experts: ExpertLayout,
    small: list[str],
    old: Collection[str],
) -> None:
    """Turns finished temporaries into the checkpoint of this directory: the weight files, those in `small`, and the
    manifest; `old` are files of an earlier checkpoint.

    The manifest is written first as `pending`: from then on the new files are what a reader gets, under their temporary
    names where they have not yet been renamed. A run killed after that is completed by `finish_pending`.
    """
    source.check_unchanged()
    files: dict[str, dict[str, Any]] = {}
    for name, writer in staging.writers.items():
        assert writer.facts is not None, f"{name} is not finished"
        files[name] = writer.facts | ({} if ranks is None else {"rank": int(writer.metadata["rank"])})
    manifest = {
        "format": CAST_FORMAT if ranks is None else FORMAT,
        "version": VERSION,
        **({} if ranks is None else {"ranks": ranks, "experts": experts}),
        "written_by": versions(),
        "source": source.facts,
        "small": {name: staging.small[name] for name in small},
        "files": files,
    }
    name = manifest_name(ranks)
    staging.write_json(name, manifest | {"pending": True, "obsolete": sorted(set(old) - files.keys())})
    staging.settle(*(name for name in small if name != HF_INDEX))
    staging.settle(name)
    finish(staging, Manifest(staging.folder, ranks))


def pending(staging: Staging) -> list[Manifest]:
    """Commits that have begun but not ended. Manifests that are damaged or of another version are not loaded from, and
    the new one may take their place."""
    found: list[Manifest] = []
    for ranks in manifests_in(staging.folder):
        with contextlib.suppress(UserError):
            found.append(Manifest(staging.folder, ranks))
    return [manifest for manifest in found if manifest.pending]


def needed(staging: Staging) -> list[str]:
    """The temporaries they need."""
    return [name for manifest in pending(staging) for name in (*manifest.files, HF_INDEX)]


def finish_pending(staging: Staging) -> None:
    """Completes commits that have begun."""
    for manifest in pending(staging):
        finish(staging, manifest)


def finish(staging: Staging, manifest: Manifest) -> None:
    """Completes a commit: files take their names, those of an earlier checkpoint go."""
    if staging.temporary(HF_INDEX).exists():  # nobody may find an index while files of two checkpoints lie there
        staging.remove(HF_INDEX)
    staging.settle(*manifest.files)
    staging.remove(*manifest.obsolete)
    staging.settle(HF_INDEX)
    raw = {key: value for key, value in manifest.raw.items() if key not in ("pending", "obsolete")}
    staging.write_json(manifest.path.name, raw)
    staging.settle(manifest.path.name)


# --------------------------------------------------------------------------------------------------------------------
# Verified
# --------------------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """Something in a directory that is not as its manifest has it."""

    file: Path
    tensor: str | None
    problem: str  # with what was expected and what was found

    def __str__(self) -> str:
        return f"{self.file}: {f'{self.tensor}: ' if self.tensor else ''}{self.problem}"


def verify(folder: Path, progress: Callable[[int], object] = lambda _: None) -> Iterator[Finding]:
    """Reads everything in a directory that has manifests, in bounded memory, and yields what differs from them.

    `progress` is told of bytes read. Raises UserError where there is no manifest, or a damaged one.
    """
    manifests = read_manifests(folder)
    if not manifests:
        raise UserError(f"{folder}: no manifest, so nothing to compare with: convert.py and fp8_cast_bf16.py write one")
    known = {name for manifest in manifests.values() for name in (*manifest.files, *manifest.obsolete)}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in known and not path.name.startswith("."):
            yield Finding(path, None, "expected no such file, found one that no manifest names")
    for manifest in manifests.values():
        for file in (*manifest.small, *manifest.files):
            yield from verify_file(manifest, file, progress)


def verify_file(manifest: Manifest, file: str, progress: Callable[[int], object] = lambda _: None) -> Iterator[Finding]:
    """The same for one of the manifest's files: each tensor that differs, or else what does."""
    path = manifest.where(file)
    wanted = manifest.files.get(file) or manifest.small[file]
    if not path.is_file():
        yield Finding(path, None, f"expected {wanted['bytes']} bytes, found no such file")
        return
    if (size := path.stat().st_size) != wanted["bytes"]:
        yield Finding(path, None, f"expected {wanted['bytes']} bytes, found {size}")
        return
    try:
        found: dict[str, Any] = hash_file(path, progress) if file in manifest.files else {"sha256": _sha256(path)}
    except UserError as e:
        yield Finding(path, None, str(e).removeprefix(f"{path}: "))
        return
    held = found.get("tensors", {})
    bad = 0
    for name, digest in wanted.get("tensors", {}).items():
        if held.get(name) != digest:
            bad += 1
            yield Finding(path, name, f"expected CRC32 and SHA-256 {digest}, found {held.get(name, 'no such tensor')}")
    if not bad and found["sha256"] != wanted["sha256"]:
        where = "header: " if held else ""
        yield Finding(path, None, f"{where}expected SHA-256 {wanted['sha256']}, found {found['sha256']}")


def verify_command(folder: Path) -> int:
    """Verifies a directory for a command line, with a progress bar; returns the exit status. Raises UserError."""
    files = [facts for manifest in read_manifests(folder).values() for facts in manifest.files.values()]
    total = sum(facts["bytes"] for facts in files)
    bad = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying") as bar:
        for finding in verify(folder, bar.update):
            bar.clear()
            print(finding, flush=True)
            bad += 1
    outcome = f"{bad} difference{'s' * (bad > 1)} from what was written" if bad else "all as it was written"
    print(f"{folder}: {len(files)} weight files, {total / 1e9:.2f} GB: {outcome}", file=sys.stderr, flush=True)
    return 1 if bad else 0


def require_hashes(folder: Path, ranks: int, share: tuple[int, int], progress: bool = True) -> None:
    """Verifies, before a load for that many ranks, the i-th of every n files, `share` being (i, n): the ranks of a host
    divide the work. Raises UserError with the first difference, or where there is no manifest."""
    manifests = read_manifests(folder)
    manifest = manifests.get(ranks) or manifests.get(None)
    if manifest is None:
        raise UserError(f"{folder}: --verify needs the manifest that convert.py and fp8_cast_bf16.py write")
    files = [*manifest.files, *manifest.small][share[0] :: share[1]]
    total = sum(manifest.files[file]["bytes"] for file in files if file in manifest.files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=not progress) as bar:
        for file in files:
            for finding in verify_file(manifest, file, bar.update):
                raise UserError(str(finding))
