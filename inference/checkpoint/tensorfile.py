"""safetensors files read and written in bounded memory, and folders of them that appear whole or not at all.

Nothing is mapped: a mapped page counts as memory of the process, and a checkpoint has hundreds of gigabytes of them.
Bytes move through one window of a few MiB with pread and pwrite, so memory does not depend on the size of anything.

The format (huggingface.co/docs/safetensors): 8 bytes with the header's length, the header as JSON, then the tensors,
without gaps; offsets count from the header's end.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from core.errors import CheckpointError, UserError
from core.files import unique, without_waiting

WINDOW = 16 << 20  # bytes read at a time
TEMPORARY = ".tmp-"  # what a file's name begins with until it is complete
JOURNAL = ".progress"  # under a temporary name; names with two dots in front are nobody else's
MAX_HEADER = 100 << 20  # the format's own limit
MAX_NAME = 500  # characters of a tensor's name

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BF16": torch.bfloat16, "F16": torch.float16,
    "F32": torch.float32, "F64": torch.float64, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes [start, start + nbytes) of a file."""

    file: Path
    name: str  # in that file
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int
    crc: str | None = None  # CRC32 of its bytes in hex, where somebody noted it

    @property
    def rows(self) -> int:
        """Size of the first dimension; what is read and cut is rows."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(self.rows, 1)

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


def describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """A tensor's type in the words of the format, for messages: "BF16 4x256"."""
    return f"{DTYPE_NAMES.get(dtype, dtype)} {'x'.join(map(str, shape)) or 'scalar'}"


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """A file's metadata and its tensors in the order they lie in it.

    Raises UserError, naming the file and where possible the tensor, for anything but a whole, well-formed file.
    """
    try:
        with open(path, "rb", buffering=0, opener=without_waiting) as f:
            info = os.fstat(f.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{path}: not a regular file", path)
            length = int.from_bytes(f.read(8), "little")
            if info.st_size < 8 or not 2 <= length <= min(MAX_HEADER, info.st_size - 8):
                raise CheckpointError(f"{path}: truncated, or not a safetensors file ({info.st_size} bytes)", path)
            text = f.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", path) from None
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})", path) from None
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: header is not valid JSON ({e})", path) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings", path)
    entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
    entries.sort(key=lambda e: (e.start, e.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            text = f"{entry}: data_offsets leave a gap or overlap another tensor"
            raise CheckpointError(text, path, entry.name, end - 8 - length, entry.start - 8 - length)
        end += entry.nbytes
    if end != info.st_size:
        kind = "truncated" if end > info.st_size else "has bytes no tensor owns"
        text = f"{path}: {kind}: expected {end} bytes, found {info.st_size}"
        raise CheckpointError(text, path, "", f"{end} bytes", f"{info.st_size} bytes")
    return metadata, {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, fields: Any, base: int) -> Entry:
    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)

    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        wanted, found = f"1 to {MAX_NAME} printable characters", repr(name[:MAX_NAME])
        raise CheckpointError(f"{path}: a tensor's name is {found}, expected {wanted}", path, "", wanted, found)
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= set(fields):
        raise CheckpointError(f"{path}: {name}: expected dtype, shape and data_offsets in the header", path, name)
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not sizes(shape) or not sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name}: shape or data_offsets in the header are not sizes", path, name)
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {name}: unknown dtype {fields['dtype']!r}", path, name, "", fields["dtype"])
    dtype = DTYPES[fields["dtype"]]
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        what, span = describe(dtype, tuple(shape)), offsets[1] - offsets[0]
        text = f"{path}: {name}: {what} takes {nbytes} bytes, its data_offsets span {span}"
        raise CheckpointError(text, path, name, f"{nbytes} bytes", f"{span} bytes")
    return Entry(path, name, dtype, tuple(shape), base + offsets[0], nbytes)


class Reader:
    """Reads tensors a window at a time, with one file open at a time: ask for them in the order they lie on disk."""

    def __init__(self, window: int = WINDOW):
        self.window = window
        self.path: Path | None = None
        self.fd = -1
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.path, self.fd = None, -1

    def rows(
        self, entry: Entry, first: int = 0, last: int | None = None, step: int = 1
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows [first, last) in windows: (number of the first row, uint8 (n, row_bytes)). All but the last window
        have a multiple of `step` rows.

        A window is valid until the next one is asked for. Raises UserError when the file cannot be read or ends early,
        and, after the last window of a whole tensor whose checksum is known, when the bytes do not have it.
        """
        last = entry.rows if last is None else last
        n = max(self.window // max(entry.row_bytes, 1) // step, 1) * step
        need = min(n, last - first) * entry.row_bytes
        if need > len(self.buffer):
            self.buffer = torch.empty(need, dtype=torch.uint8)
        crc = 0
        for row in range(first, last, n):
            count = min(n, last - row)
            data = self.buffer[: count * entry.row_bytes]
            view = data.numpy().data
            self._fill(entry, entry.start + row * entry.row_bytes, view)
            if entry.crc is not None:
                crc = zlib.crc32(view, crc)
            yield row, data.view(count, entry.row_bytes)
        if entry.crc is not None and last - first == entry.rows and f"{crc:08x}" != entry.crc:
            text = f"{entry}: damaged: its checksum is {crc:08x}, {entry.crc} was written"
            raise CheckpointError(text, entry.file, entry.name, entry.crc, f"{crc:08x}")

    def windows(self, entry: Entry) -> Iterator[memoryview]:
        """The tensor's bytes in windows, whatever its rows. Valid and wrong as `rows` says."""
        flat = replace(entry, dtype=torch.uint8, shape=(entry.nbytes,))
        return (data.numpy().data.cast("B") for _, data in self.rows(flat))

    def read(self, entry: Entry) -> torch.Tensor:
        """The whole tensor, in its own memory."""
        rows = [data.clone() for _, data in self.rows(entry)]
        return torch.cat(rows).view(-1).view(entry.dtype).view(entry.shape)

    def _fill(self, entry: Entry, at: int, view: memoryview) -> None:
        try:
            if self.path != entry.file:
                self.close()
                self.fd = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
                self.path = entry.file
            while view:
                got = os.preadv(self.fd, [view], at)
                if not got:
                    raise CheckpointError(f"{entry}: the file ends before the tensor does", entry.file, entry.name)
                view, at = view[got:], at + got
        except OSError as e:
            raise CheckpointError(f"{entry}: cannot be read ({e.strerror})", entry.file, entry.name) from None


class Digest:
    """CRC32 and SHA-256 of a tensor's bytes, which come in order. As text: "crc32 sha256", both in hex."""

    def __init__(self) -> None:
        self.crc, self.sha = 0, hashlib.sha256()

    def update(self, view: memoryview) -> None:
        self.crc = zlib.crc32(view, self.crc)
        self.sha.update(view)

    def __str__(self) -> str:
        return f"{self.crc:08x} {self.sha.hexdigest()}"


def hash_both(whole: Any, digest: Digest, view: memoryview) -> None:
    """Gives bytes to a file's hash and to a tensor's: at once, on two cores, where they are worth a thread."""
    if len(view) < 1 << 20:
        whole.update(view)
        digest.update(view)
        return
    other = threading.Thread(target=whole.update, args=(view,))
    other.start()
    digest.update(view)
    other.join()


def hash_file(path: Path, progress: Callable[[int], object]) -> dict[str, Any]:
    """What a manifest says of a weight file: its "bytes", its "sha256", and the Digest of each of its "tensors".

    `progress` is told of bytes read. Raises UserError for what is not a whole, well-formed file that can be read.
    """
    _, entries = read_header(path)
    size = path.stat().st_size
    with Reader() as reader:
        header = Entry(path, "header", torch.uint8, (), 0, size - sum(e.nbytes for e in entries.values()))
        whole = hashlib.sha256()
        for view in reader.windows(header):
            whole.update(view)
            progress(len(view))
        digests = {name: Digest() for name in entries}
        for name, entry in entries.items():
            for view in reader.windows(entry):
                hash_both(whole, digests[name], view)
                progress(len(view))
    return {"bytes": size, "sha256": whole.hexdigest(), "tensors": {name: str(d) for name, d in digests.items()}}


class Writer:
    """A safetensors file whose tensors are known beforehand and whose bytes may come in any order of tensors.

    It exists on disk, in full length, from the first byte written, and is durable (fsync) once the last one is. Then
    `facts` is what hash_file would say of it. Hashing costs no second look at the bytes where the tensors are written
    in the order they were given.
    """

    HEADER_ROOM = 256  # no tensor takes more of the header: names and sizes are short

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: dict[str, str],
        finished: Callable[["Writer"], object] = lambda _: None,
    ):
        self.path, self.metadata, self.finished = path, metadata, finished
        header: dict[str, Any] = {"__metadata__": metadata}
        self.starts: dict[str, int] = {}
        end = 0
        # in the order given; but what would leave its followers unaligned comes at the end, wide types first
        nbytes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
        for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize if nbytes[name] % 8 else -math.inf):
            dtype, shape = tensors[name]
            self.starts[name], start = end, end
            end += nbytes[name]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.starts = {name: len(self.header) + start for name, start in self.starts.items()}
        self.body, self.size = end, len(self.header) + end
        self.facts: dict[str, Any] | None = None
        self.digests: dict[str, Digest] = {}
        self.whole, self.hashed = hashlib.sha256(self.header), len(self.header)  # of the file's first bytes
        self.missing = end
        self.fd = -1

    def write(self, name: str, data: torch.Tensor, at: int) -> None:
        """Puts data's bytes `at` bytes into the tensor. Each tensor's bytes must come in order, for its checksum."""
        if not data.numel():
            return
        if self.fd < 0:
            self._open()
        view = data.contiguous().view(-1).view(torch.uint8).numpy().data
        if self.starts[name] + at == self.hashed:
            hash_both(self.whole, self.digests[name], view)
            self.hashed += len(view)
        else:
            self.digests[name].update(view)
        put(self.fd, view, self.starts[name] + at)
        self.missing -= len(view)
        if not self.missing:
            self._finish()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _open(self) -> None:
        self.digests = {name: Digest() for name in self.starts}
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        os.ftruncate(self.fd, self.size)
        put(self.fd, memoryview(self.header), 0)

    def _finish(self) -> None:
        while self.hashed < self.size:  # what did not come in its turn
            data = os.pread(self.fd, min(WINDOW, self.size - self.hashed), self.hashed)
            self.whole.update(data)
            self.hashed += len(data)
        sync(self.fd)
        if hasattr(os, "posix_fadvise"):  # leave the cache to whoever else needs it
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()
        tensors = {name: str(digest) for name, digest in self.digests.items()}
        self.facts = {"bytes": self.size, "sha256": self.whole.hexdigest(), "tensors": tensors}
        self.digests.clear()
        self.finished(self)


class Staging:
    """Files on their way into a folder: written under temporary names, then made durable and given their own.

    Used as a context: it makes the folder, keeps a second program out, and at the end removes temporaries left over.
    `needed` tells, from what lies on disk, which of them an unfinished commit still needs.

    A journal names the weight files that are finished, each with its hash. When a run is cut short, they stay, and
    the next run of the same job goes on from there; only a disk that cannot be written to (a full one) gets them all
    off. The journal: a line with the job's hash, then a line [name, sha256] for each file once it is durable.
    """

    def __init__(self, folder: Path, needed: Callable[["Staging"], Iterable[str]] = lambda _: ()):
        self.folder, self.needed = folder, needed
        self.writers: dict[str, Writer] = {}
        self.small: dict[str, dict[str, Any]] = {}  # other files written: bytes and SHA-256
        self.kept: set[str] = set()  # finished weight files
        self.fd = self.journal = -1
        self.noted = 0  # bytes of the journal

    def __enter__(self) -> "Staging":
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
        begun = self.journal >= 0
        if begun:
            os.close(self.journal)
            self.journal = -1
        if kind is None or isinstance(error, OSError):
            self.kept.clear()
        try:
            if begun:
                self.sweep()
        finally:
            self._close()
        if self.kept:
            size = sum(self.writers[name].size for name in self.kept) / 1e9
            print(
                f"{self.folder}: finished files ({len(self.kept)}, {size:.2f} GB) are kept; the same command goes on "
                f"from there ({TEMPORARY}* may be removed)",
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

    def temporary(self, name: str) -> Path:
        return self.folder / (TEMPORARY + name)

    def writer(
        self, name: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
    ) -> Writer:
        """For a weight file of this folder."""
        self.writers[name] = Writer(self.temporary(name), tensors, metadata, lambda writer: self._note(name, writer))
        return self.writers[name]

    def resume(self, job: Any) -> None:
        """Begins, with all writers made, or goes on where a run of the same job was cut short: writers of files it
        finished then have their `facts`. All other temporaries go.

        `job` is what, besides the headers of the files, decides every byte of them. What was finished is read again:
        nobody need trust what lay about under a temporary name.
        """
        headers = {name: hashlib.sha256(writer.header).hexdigest() for name, writer in self.writers.items()}
        identity = hashlib.sha256(json.dumps([job, headers]).encode()).hexdigest()
        path = self.temporary(JOURNAL)
        before = path.read_bytes() if path.exists() else b""
        text = json.dumps({"job": identity}).encode() + b"\n"
        finished = _journal_lines(before[len(text) :]) if before.startswith(text) else {}
        finished = {name: sha for name, sha in finished.items() if name in self.writers}
        total = sum(self.writers[name].size for name in finished)
        with tqdm(total=total, unit="B", unit_scale=True, desc="checking what was finished", disable=not total) as bar:
            for name, sha in finished.items():
                if self._take_over(name, sha, bar.update):
                    self.kept.add(name)
                    text += _journal_line(name, sha)
        self.journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not before.startswith(text):
            os.ftruncate(self.journal, 0)
            put(self.journal, memoryview(text), 0)
        os.ftruncate(self.journal, len(text))
        self.noted = len(text)
        self.sweep()

    def _take_over(self, name: str, sha: str, progress: Callable[[int], object]) -> bool:
        """Whether a file lies here as it was finished; it may have its own name already."""
        writer = self.writers[name]
        for path in (writer.path, self.folder / name):
            try:
                facts = hash_file(path, progress) if path.exists() else None
            except UserError:
                facts = None
            if facts and facts["sha256"] == sha:
                writer.facts, writer.missing = facts, 0
                return True
            if path == writer.path:
                path.unlink(missing_ok=True)
        return False

    def _note(self, name: str, writer: Writer) -> None:
        if self.journal >= 0 and writer.facts:
            line = _journal_line(name, writer.facts["sha256"])
            put(self.journal, memoryview(line), self.noted)
            sync(self.journal)
            self.noted += len(line)
            self.kept.add(name)

    def sweep(self) -> None:
        """Removes temporaries, of this run or of one that was killed, but for what is finished."""
        journal = [JOURNAL] if self.journal >= 0 or self.kept else []
        needed = {self.temporary(name) for name in (*self.needed(self), *self.kept, *journal)}
        for path in self.folder.glob(TEMPORARY + "*"):
            if path not in needed:
                path.unlink(missing_ok=True)

    def require(self, nbytes: int) -> None:
        """Raises UserError unless that many bytes besides the weight files yet to be written, and a little more, are
        free."""
        disk = os.statvfs(self.folder)
        nbytes += sum(writer.size for writer in self.writers.values() if writer.missing)
        free, need = disk.f_bavail * disk.f_frsize, nbytes + (16 << 20)
        if free < need:
            raise UserError(f"{self.folder}: needs {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free")

    def copy(self, source: Path) -> str:
        """Copies a file (what it links to, if it is a link) to a temporary; returns its name."""

        def blocks() -> Iterator[bytes]:
            try:
                with open(source, "rb") as f:
                    while block := f.read(1 << 20):
                        yield block
            except OSError as e:
                raise UserError(f"{source}: cannot be read ({e.strerror})") from None

        self._fill(source.name, blocks())
        return source.name

    def write_json(self, name: str, value: Any) -> None:
        self._fill(name, [(json.dumps(value, indent=1) + "\n").encode()])

    def _fill(self, name: str, blocks: Iterable[bytes]) -> None:
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

    def settle(self, *names: str) -> None:
        """Gives finished files their own names, in this order, if they have not got them. Each takes it at once; when
        this returns they all have durably."""
        sync(self.fd)
        for name in names:
            if self.temporary(name).exists():
                os.replace(self.temporary(name), self.folder / name)
        sync(self.fd)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        sync(self.fd)


def _journal_line(name: str, sha: str) -> bytes:
    return json.dumps([name, sha]).encode() + b"\n"


def _journal_lines(text: bytes) -> dict[str, str]:
    """What a journal says after its first line, up to a line that was cut short."""
    found: dict[str, str] = {}
    for line in text.splitlines(keepends=True):
        try:
            name, sha = json.loads(line)
            found[name] = sha
        except (ValueError, TypeError):
            break
    return found


def put(fd: int, view: memoryview, at: int) -> None:
    """Writes all of it at that place of a file."""
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def sync(fd: int) -> None:
    """fsync, without complaint from file systems that have none for directories."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise


def small_files(folder: Path) -> list[Path]:
    """Everything plain in a checkpoint's folder that is not weights: tokenizer, templates, licences, code."""
    weights = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
    found = (p for p in folder.iterdir() if not p.name.startswith(".") and not p.name.endswith(weights))
    return sorted(p for p in found if p.is_file())
