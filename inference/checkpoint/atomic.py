"""Files that appear in a folder whole or not at all, and a run that goes on where an earlier one was cut short."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from checkpoint.reading import hash_file
from checkpoint.writing import Writer, put, sync
from core.errors import UserError

TEMPORARY = ".tmp-"  # prefix of a file's name until the file is complete
PENDING = ".pending-"  # prefix of a manifest's name until all of its files have their own names
JOURNAL = ".progress"  # name, after TEMPORARY, of the list of finished files; weight files do not begin with a dot


class AtomicWriter:
    """Writes files of one folder under temporary names, makes them durable, and then gives them their own names.

    As a context manager it makes the folder, locks out other programs, and removes leftover temporaries at the end.

    The journal lists the finished weight files: one line with the job's hash, then a line [name, sha256] for each file
    once it is durable. When a run is cut short these files stay, and the next run of the same job resumes from them.
    After an error of the disk (a full one) they are removed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.writers: dict[str, Writer] = {}
        self.small: dict[str, dict[str, Any]] = {}  # "bytes" and "sha256" of other files that were written
        self.finished: set[str] = set()  # names of weight files
        self.fd = self.journal = -1
        self.journal_bytes = 0

    def __enter__(self) -> "AtomicWriter":
        """Raises UserError where the folder cannot be written to, or another program is writing to it."""
        try:
            import fcntl  # here, as a checkpoint can be read without
        except ImportError:
            raise UserError("writing a checkpoint takes a Unix system, which locks and syncs folders") from None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._close()
                raise UserError(f"{self.folder}: another program is writing a checkpoint here") from None
            except OSError:
                pass  # a file system without locks
            probe = self.temporary(".probe")
            probe.touch()
            probe.unlink()
        except OSError as e:
            self._close()
            raise UserError(f"{self.folder}: cannot be written ({e.strerror})") from None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for writer in self.writers.values():
            writer.close()
        started = self.journal >= 0
        if started:
            os.close(self.journal)
            self.journal = -1
        if kind is None or isinstance(error, OSError):
            self.finished.clear()
        try:
            if started:
                self.remove_temporaries()
        finally:
            self._close()
        if self.finished and not self._is_pending():
            size = sum(self.writers[name].size for name in self.finished) / 1e9
            print(
                f"{self.folder}: finished files ({len(self.finished)}, {size:.2f} GB) are kept; the same command goes "
                f"on from there ({TEMPORARY}* may be removed)",
                file=sys.stderr,
                flush=True,
            )
        if isinstance(error, OSError):
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(f"{self.folder}: cannot be written: {error.strerror or error}{where}") from error

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _is_pending(self) -> bool:
        return any(self.folder.glob(PENDING + "*"))

    def temporary(self, name: str) -> Path:
        return self.folder / (TEMPORARY + name)

    # --- weight files and the journal ---------------------------------------------------------------------------------

    def writer(
        self, name: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
    ) -> Writer:
        """A Writer for a weight file of this folder."""
        self.writers[name] = Writer(
            self.temporary(name), tensors, metadata, lambda writer: self._add_finished(name, writer)
        )
        return self.writers[name]

    def start(self, job: Any) -> None:
        """Starts writing, once all writers are made, or resumes a run of the same job: writers of files that it
        finished have their `record` then. Removes all other temporaries.

        `job` is JSON of everything besides the files' headers that determines their bytes. Finished files are read and
        compared with the journal's hash.
        """
        headers = {name: hashlib.sha256(writer.header).hexdigest() for name, writer in self.writers.items()}
        identity = hashlib.sha256(json.dumps([job, headers]).encode()).hexdigest()
        path = self.temporary(JOURNAL)
        before = path.read_bytes() if path.exists() else b""
        text = json.dumps({"job": identity}).encode() + b"\n"
        listed = _journal_lines(before[len(text) :]) if before.startswith(text) else {}
        listed = {name: sha for name, sha in listed.items() if name in self.writers}
        total = sum(self.writers[name].size for name in listed)
        with tqdm(total=total, unit="B", unit_scale=True, desc="checking what was finished", disable=not total) as bar:
            for name, sha in listed.items():
                if self._is_finished(name, sha, bar.update):
                    self.finished.add(name)
                    text += _journal_line(name, sha)
        self.journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not before.startswith(text):
            os.ftruncate(self.journal, 0)
            put(self.journal, memoryview(text), 0)
        os.ftruncate(self.journal, len(text))
        self.journal_bytes = len(text)
        self.remove_temporaries()

    def _is_finished(self, name: str, sha: str, progress: Callable[[int], object]) -> bool:
        """Whether a file with this hash is there, under its temporary or its own name. Removes a damaged temporary."""
        writer = self.writers[name]
        for path in (writer.path, self.folder / name):
            try:
                record = hash_file(path, progress) if path.exists() else None
            except UserError:
                record = None
            if record and record["sha256"] == sha:
                writer.record, writer.unwritten = record, 0
                return True
            if path == writer.path:
                path.unlink(missing_ok=True)
        return False

    def _add_finished(self, name: str, writer: Writer) -> None:
        if self.journal >= 0 and writer.record:
            line = _journal_line(name, writer.record["sha256"])
            put(self.journal, memoryview(line), self.journal_bytes)
            sync(self.journal)
            self.journal_bytes += len(line)
            self.finished.add(name)

    def remove_temporaries(self) -> None:
        """Removes temporaries of this run and of earlier ones, except finished weight files and their journal. Removes
        none while a commit is pending, which needs them."""
        if self._is_pending():
            return
        kept = {self.temporary(name) for name in self.finished}
        if self.journal >= 0 or self.finished:
            kept.add(self.temporary(JOURNAL))
        for path in self.folder.glob(TEMPORARY + "*"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def require_space(self, nbytes: int) -> None:
        """Raises UserError unless the disk has room for the weight files that are not written yet, `nbytes` more, and
        a reserve of 16 MiB."""
        disk = os.statvfs(self.folder)
        nbytes += sum(writer.size for writer in self.writers.values() if writer.unwritten)
        free, need = disk.f_bavail * disk.f_frsize, nbytes + (16 << 20)
        if free < need:
            raise UserError(f"{self.folder}: needs {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free")

    # --- other files --------------------------------------------------------------------------------------------------

    def copy(self, source: Path) -> None:
        """Copies a file, or the file that a link points to, to a temporary. Raises UserError if it cannot be read."""

        def blocks() -> Iterator[bytes]:
            try:
                with open(source, "rb") as f:
                    while block := f.read(1 << 20):
                        yield block
            except OSError as e:
                raise UserError(f"{source}: cannot be read ({e.strerror})") from None

        self._write(source.name, blocks())

    def write_json(self, name: str, value: Any) -> None:
        self._write(name, [(json.dumps(value, indent=1) + "\n").encode()])

    def _write(self, name: str, blocks: Iterable[bytes]) -> None:
        sha, at = hashlib.sha256(), 0
        fd = os.open(self.temporary(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            for block in blocks:
                put(fd, memoryview(block), at)
                sha.update(block)
                at += len(block)
            sync(fd)
        finally:
            os.close(fd)
        self.small[name] = {"bytes": at, "sha256": sha.hexdigest()}

    # --- names --------------------------------------------------------------------------------------------------------

    def commit(self, *names: str) -> None:
        """Gives finished files their own names, in this order, where they still have temporary ones. Each rename is
        atomic; all of them are durable on return."""
        self.rename({TEMPORARY + name: name for name in names if self.temporary(name).exists()})

    def rename(self, names: Mapping[str, str]) -> None:
        """Renames files of the folder, in order, with the names durable before and after."""
        sync(self.fd)
        for old, new in names.items():
            os.replace(self.folder / old, self.folder / new)
        sync(self.fd)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        sync(self.fd)


def _journal_line(name: str, sha: str) -> bytes:
    return json.dumps([name, sha]).encode() + b"\n"


def _journal_lines(text: bytes) -> dict[str, str]:
    """The hash of each file that a journal lists after its first line, up to a line that was cut short."""
    found: dict[str, str] = {}
    for line in text.splitlines(keepends=True):
        try:
            name, sha = json.loads(line)
            found[name] = sha
        except (ValueError, TypeError):
            break
    return found
