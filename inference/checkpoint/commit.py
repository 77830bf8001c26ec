"""The moment at which files that were written become the checkpoint of their directory.

The manifest is renamed first, to its pending name: from then on a reader gets the new files, under their temporary
names where they still have them, and not those of an earlier checkpoint. Then the files get their own names, those of
the earlier checkpoint are removed, and the manifest gets its own name. `finish_pending` completes a commit that was
interrupted. Programs that know nothing of manifests find no Hugging Face index meanwhile.
"""

import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from checkpoint.atomic import PENDING, TEMPORARY, AtomicWriter
from checkpoint.manifest import (
    HF_INDEX,
    HF_MANIFEST,
    VERSION,
    Manifest,
    manifest_name,
    manifests_in,
    sha256_of,
)
from checkpoint.reading import read_header
from core import PROGRAM_VERSION
from core.errors import UserError
from core.files import read_json


class Source:
    """The directory that a checkpoint is made from, in the state of this moment."""

    def __init__(self, folder: Path, files: Iterable[str]):
        """`files` names its weight files. It is made before any of them is read; the checks report damage."""
        self.folder, self.files = folder, [folder / file for file in sorted(files)]
        self.state = self._state()

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes for a manifest, once the checks have passed. Raises UserError for a file that cannot be read."""
        config = {"config_sha256": sha256_of(self.folder / "config.json")}
        for name in (PENDING + HF_MANIFEST, HF_MANIFEST):
            if (self.folder / name).exists():
                return config | {"manifest_sha256": sha256_of(self.folder / name)}
        return config | {"headers_sha256": hash_headers(self.folder, self.files)}

    def _state(self) -> list[tuple[str, int, int]]:
        """Each file's real path, size in bytes and time of the last write in ns; -1 where there is no file."""
        found = []
        for path in (self.folder / "config.json", *self.files):
            try:
                info = path.stat()
                found.append((os.path.realpath(path), info.st_size, info.st_mtime_ns))
            except OSError:
                found.append((str(path), -1, -1))
        return found

    def check_unchanged(self) -> None:
        """Raises UserError if one of its files was written since."""
        for (path, *before), (_, *now) in zip(self.state, self._state(), strict=True):
            if before != now:
                raise UserError(f"{path}: was changed while it was read; run the command again")


def hash_headers(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of each weight file's name, a zero byte, its size in 8 bytes and its header with the length in front,
    then of the index file's bytes. Raises UserError for a file that cannot be read."""
    sha = hashlib.sha256()
    try:
        for path in files:
            with open(path, "rb", buffering=0) as f:
                length = f.read(8)
                sha.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little") + length)
                sha.update(f.read(int.from_bytes(length, "little")))
        if (folder / HF_INDEX).exists():
            sha.update((folder / HF_INDEX).read_bytes())
    except OSError as e:
        raise UserError(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    return sha.hexdigest()


@functools.cache
def versions() -> dict[str, str]:
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "safetensors")}
    return {"program": PROGRAM_VERSION, **libraries}


def check_target(target: Path, mark: dict[str, str], config: dict[str, Any]) -> None:
    """Raises UserError if a directory to write to holds weights without the writer's mark, or another model's
    config."""
    for path in sorted(target.glob("*.safetensors")):
        if not path.name.startswith(TEMPORARY) and not mark.items() <= read_header(path)[0].items():
            raise UserError(f"{path}: not written by this program; choose another directory or remove it")
    for ranks in manifests_in(target):
        path = target / manifest_name(ranks)
        if path.exists() and b'"pending": true' in path.read_bytes():
            Manifest(target, ranks)  # refuses it: its files have temporary names, which a new commit removes
    path = target / "config.json"
    if path.exists() and read_json(path) != config:
        raise UserError(f"{path}: another model's; choose another directory or remove what is there")


def commit(
    out: AtomicWriter, source: Source, format: str, ranks: int | None, layout: dict[str, Any], small: Sequence[str]
) -> None:
    """Makes the finished files, those named in `small` and a manifest of that format the checkpoint of the directory.
    `layout`: the manifest's fields that say how weights are divided. Raises UserError if the source has changed."""
    source.check_unchanged()
    files: dict[str, dict[str, Any]] = {}
    for name, writer in out.writers.items():
        assert writer.record is not None, f"{name} is not finished"
        place = {key: int(value) for key, value in writer.metadata.items() if key in ("rank", "stage")}
        files[name] = writer.record | place
    name = manifest_name(ranks)
    out.write_json(
        name,
        {
            "format": format,
            "version": VERSION,
            **layout,
            "written_by": versions(),
            "source": source.hashes,
            "small": {name: out.small[name] for name in small},
            "files": files,
        },
    )
    out.commit(*(name for name in small if name != HF_INDEX))
    out.rename({TEMPORARY + name: PENDING + name})
    _finish(out, Manifest(out.folder, ranks))


def finish_pending(out: AtomicWriter, replaced: int | None) -> None:
    """Completes commits that were interrupted. `replaced`: the ranks (None: whole tensors) whose manifest the next
    commit replaces, and which may be damaged. Raises UserError for another one that is pending and damaged: it would
    hide its checkpoint for good."""
    for ranks in manifests_in(out.folder):
        try:
            manifest = Manifest(out.folder, ranks)
        except UserError:
            if ranks != replaced and (out.folder / (PENDING + manifest_name(ranks))).exists():
                raise
            continue
        if manifest.pending:
            _finish(out, manifest)


def _finish(out: AtomicWriter, manifest: Manifest) -> None:
    index = [HF_INDEX] if HF_INDEX in manifest.small else []
    if manifest.ranks is None and (not index or out.temporary(HF_INDEX).exists()):
        out.remove(HF_INDEX)
    out.commit(*manifest.files)
    out.remove(*(path.name for path in sorted(out.folder.glob("*.safetensors"))
                 if not path.name.startswith(".") and manifest.replaces(path.name)))  # fmt: skip
    out.commit(*index)
    out.rename({manifest.path.name: manifest.path.name.removeprefix(PENDING)})
