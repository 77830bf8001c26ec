"""safetensors files read in bounded memory.

Nothing is memory-mapped: a mapped page counts as memory of the process, and a checkpoint has hundreds of gigabytes.
Bytes pass through one buffer of a few MiB, so memory does not depend on the size of a file.

The format (huggingface.co/docs/safetensors): 8 bytes with the header's length, the header as JSON, then the tensors
without gaps. Offsets count from the header's end.
"""

import hashlib
import json
import math
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError
from core.files import missing, reject_duplicate_keys, stand_in, without_waiting

WINDOW = 16 << 20  # bytes read at a time
MAX_HEADER = 100 << 20  # bytes; the format's own limit
MAX_NAME = 500  # characters of a tensor's name

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I8": torch.int8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor on disk: bytes [start, start + nbytes) of a file."""

    file: Path
    name: str  # in that file
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int
    crc: str | None = None  # CRC-32 of its bytes in hex, where a manifest has it
    part: str = ""  # of a stacked tensor: which part this is, as an index ("[5, :64]"); see stacked.py
    # of a tensor that is made of others' bytes: reads it whole, in this dtype and shape; see packed.py
    remake: "Callable[[Reader], torch.Tensor] | None" = field(default=None, compare=False)

    @property
    def rows(self) -> int:
        """Size of the first dimension: tensors are read and cut by rows. A scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(self.rows, 1)

    def __str__(self) -> str:
        return f"{self.file}: {self.name}{self.part}"


def dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """A tensor's type as messages show it, with the format's own names: "BF16 4x256"."""
    return f"{DTYPE_NAMES.get(dtype, dtype)} {'x'.join(map(str, shape)) or 'scalar'}"


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """A file's metadata, and its tensors by name in the order of their bytes.

    Raises CheckpointError, which names the file and where possible the tensor, unless the file is whole and
    well-formed.
    """
    try:
        if problem := stand_in(path):
            raise problem
        with open(path, "rb", buffering=0, opener=without_waiting) as f:
            info = os.fstat(f.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{path}: not a regular file", path)
            length = int.from_bytes(f.read(8), "little")
            if info.st_size < 8 or not 2 <= length <= min(MAX_HEADER, info.st_size - 8):
                raise CheckpointError(f"{path}: truncated, or not a safetensors file ({info.st_size} bytes)", path)
            text = f.read(length)
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})", path) from None
    try:
        header = json.loads(text.decode(), object_pairs_hook=reject_duplicate_keys)
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
        what, span = dtype_and_shape(dtype, tuple(shape)), offsets[1] - offsets[0]
        text = f"{path}: {name}: {what} takes {nbytes} bytes, its data_offsets span {span}"
        raise CheckpointError(text, path, name, f"{nbytes} bytes", f"{span} bytes")
    return Entry(path, name, dtype, tuple(shape), base + offsets[0], nbytes)


class Reader:
    """Reads tensors in windows. It keeps one file open, so tensors are best read in the order they lie on disk."""

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
        """The rows [first, last) in windows: (number of the window's first row, uint8 (n, row_bytes)). All windows but
        the last have a multiple of `step` rows. The next window overwrites the one before it. A tensor that is made of
        others is read whole.

        Raises CheckpointError when the file cannot be read or ends early, and, after the last window of a whole tensor
        with a known checksum, when the bytes have another one.
        """
        last = entry.rows if last is None else last
        n = max(self.window // max(entry.row_bytes, 1) // step, 1) * step
        if entry.remake is not None:
            whole = entry.remake(self).view(-1).view(torch.uint8).view(entry.rows, entry.row_bytes)
            yield from ((row, whole[row : min(row + n, last)]) for row in range(first, last, n))
            return
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
        """The tensor's bytes in windows, regardless of its rows; otherwise as `rows`."""
        flat = replace(entry, dtype=torch.uint8, shape=(entry.nbytes,))
        return (data.numpy().data.cast("B") for _, data in self.rows(flat))

    def read(self, entry: Entry) -> torch.Tensor:
        """The whole tensor, copied out of the window."""
        rows = [data.clone() for _, data in self.rows(entry)]
        return torch.cat(rows).view(-1).view(entry.dtype).view(entry.shape)

    def _fill(self, entry: Entry, at: int, view: memoryview) -> None:
        try:
            if self.path != entry.file:
                self.close()
                self.fd = os.open(entry.file, _FLAGS)
                self.path = entry.file
            while view:
                got = _read_at(self.fd, view, at)
                if not got:
                    raise CheckpointError(f"{entry}: the file ends before the tensor does", entry.file, entry.name)
                view, at = view[got:], at + got
        except OSError as e:
            raise CheckpointError(f"{entry}: cannot be read ({e.strerror})", entry.file, entry.name) from None


_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _read_at(fd: int, view: memoryview, at: int) -> int:
    """How many bytes were read into `view` from a file's byte `at` on. os.preadv, which not every system has."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], at)
    os.lseek(fd, at, os.SEEK_SET)
    data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def require_equal(main: Entry, copy: Entry) -> None:
    """Raises CheckpointError unless two tensors of one shape have the same bytes, or, in two dtypes, the same values.
    Others are not compared: what is wrong with them is reported by Checkpoint.match."""
    if main.shape != copy.shape:
        return
    alike = main.dtype == copy.dtype
    step = (1 << 20) // max(main.row_bytes, copy.row_bytes, 1) or 1
    with Reader(1) as a, Reader(1) as b:
        for (row, left), (_, right) in zip(a.rows(main, step=step), b.rows(copy, step=step), strict=True):
            if not alike:
                left, right = left.view(main.dtype).float(), right.view(copy.dtype).float()
            if not torch.equal(left, right):
                row += int((left != right).any(dim=1).nonzero()[0])
                what = "bytes" if alike else "values"
                wanted, found = f"the {what} of {main}", f"others from row {row} on"
                raise CheckpointError(f"{copy}: expected {wanted}, found {found}", copy.file, copy.name, wanted, found)


class Digest:
    """CRC-32 and SHA-256 of bytes that arrive in order. As text: "crc32 sha256", both in hex."""

    def __init__(self) -> None:
        self.crc, self.sha = 0, hashlib.sha256()

    def update(self, view: memoryview) -> None:
        self.crc = zlib.crc32(view, self.crc)
        self.sha.update(view)

    def __str__(self) -> str:
        return f"{self.crc:08x} {self.sha.hexdigest()}"


def hash_both(file_hash: Any, digest: Digest, view: memoryview) -> None:
    """Updates a file's SHA-256 and a tensor's digest with the same bytes, from 1 MiB on in two threads."""
    if len(view) < 1 << 20:
        file_hash.update(view)
        digest.update(view)
        return
    other = threading.Thread(target=file_hash.update, args=(view,))
    other.start()
    digest.update(view)
    other.join()


def hash_file(path: Path, progress: Callable[[int], object]) -> dict[str, Any]:
    """A weight file's record in a manifest: "bytes", "sha256", and in "tensors" the Digest of each tensor as text.

    Calls `progress` with the number of bytes after each read. Raises CheckpointError as read_header and Reader do.
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
