"""One safetensors file, written in bounded memory and hashed on the way."""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint.reading import DTYPE_NAMES, WINDOW, Digest, hash_both


class Writer:
    """A safetensors file whose tensors are known from the start; they may be written in any order.

    The file has its full length from the first write on, and is durable (fsync) after the last. Then `record` equals
    hash_file's result. Tensors that are written in the given order are hashed without being read again.
    """

    HEADER_ROOM = 256  # bytes that a tensor takes of the header at the most: names and sizes are short

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
        # in the given order, but tensors that would leave their followers unaligned come last, wide types first
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
        self.size = len(self.header) + end
        self.record: dict[str, Any] | None = None
        self.digests: dict[str, Digest] = {}
        self.file_hash, self.hashed = hashlib.sha256(self.header), len(self.header)  # of the file's first bytes
        self.unwritten = end
        self.fd = -1

    def write(self, name: str, data: torch.Tensor, at: int) -> None:
        """Writes data's bytes from byte `at` of the tensor on. Bytes of a tensor must come in order, for its digest."""
        if not data.numel():
            return
        if self.fd < 0:
            self._open()
        view = data.contiguous().view(-1).view(torch.uint8).numpy().data
        if self.starts[name] + at == self.hashed:
            hash_both(self.file_hash, self.digests[name], view)
            self.hashed += len(view)
        else:
            self.digests[name].update(view)
        put(self.fd, view, self.starts[name] + at)
        self.unwritten -= len(view)
        if not self.unwritten:
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
        while self.hashed < self.size:  # what was not written in the given order
            data = os.pread(self.fd, min(WINDOW, self.size - self.hashed), self.hashed)
            self.file_hash.update(data)
            self.hashed += len(data)
        sync(self.fd)
        if hasattr(os, "posix_fadvise"):  # keep the page cache for others
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()
        tensors = {name: str(digest) for name, digest in self.digests.items()}
        self.record = {"bytes": self.size, "sha256": self.file_hash.hexdigest(), "tensors": tensors}
        self.digests.clear()
        self.finished(self)


def put(fd: int, view: memoryview, at: int) -> None:
    """Writes all bytes from offset `at` of a file on."""
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def sync(fd: int) -> None:
    """fsync; file systems that have none for directories are no error."""
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise
