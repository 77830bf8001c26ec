"""JSON and text files of a checkpoint, read with errors that name the file."""

import errno
import json
import os
import re
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

from core.errors import CheckpointError, UserError

MAX_JSON = 1 << 30  # bytes; the manifest of V3 for 16 ranks, experts split, has 175 MB
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"  # its first line (git-lfs, docs/spec.md)
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # deepseek-ai/DeepSeek-V3
MAX_POINTER = 1024  # bytes, by the same document


def require_folder(folder: Path) -> None:
    """Raises UserError unless it is a directory that can be listed and searched."""
    try:
        os.listdir(folder)
        os.stat(os.path.join(folder, os.curdir))
    except (FileNotFoundError, NotADirectoryError):
        if os.path.isfile(folder):
            raise UserError(f"{folder}: a file; give the directory that holds it") from None
        text = "no such directory"
        if HUB_NAME.fullmatch(str(folder)):
            text += f"; nothing is downloaded here: `hf download {folder} --local-dir DIR` does, if it is on the Hub"
        raise missing(folder, text) from None
    except OSError as e:
        raise UserError(f"{folder}: cannot be read ({e.strerror})") from None


def missing(path: Path, otherwise: str = "no such file") -> CheckpointError:
    """The error for a path that leads to nothing: a broken link, with its target, or `otherwise`."""
    if os.path.islink(path):
        target = repr(os.readlink(path))
        text = f"{path}: a broken link: nothing is at {target}; download or copy that, or mend the link"
        return CheckpointError(text, path, "", "a file", f"a broken link to {target}")
    return CheckpointError(f"{path}: {otherwise}", path)


def stand_in(path: Path) -> CheckpointError | None:
    """What lies in a file's place: a link that leads nowhere, or a Git LFS pointer. None for anything else, and where
    nothing is (any more)."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_POINTER:
            return None
        with open(path, "rb", opener=without_waiting) as f:
            if f.read(len(LFS_POINTER)) != LFS_POINTER:
                return None
    except OSError as e:
        return missing(path) if e.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path) else None
    text = f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its directory"
    return CheckpointError(text, path, "", "the file", "a Git LFS pointer")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises UserError naming the file when it is absent, unreadable or something else."""
    try:
        raw = json.loads(read_text(path), object_pairs_hook=reject_duplicate_keys)
    except FileNotFoundError:
        raise missing(path) from None
    except (OSError, ValueError, RecursionError) as e:
        raise stand_in(path) or CheckpointError(f"{path}: not readable as JSON ({e})", path) from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def read_text(path: Path) -> str:
    """A regular file's text. Raises OSError or ValueError, the latter also for a pipe or a device."""
    with open(path, encoding="utf-8", opener=without_waiting) as f:
        info = os.fstat(f.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("not a regular file")
        if info.st_size > MAX_JSON:
            raise ValueError(f"{info.st_size} bytes, expected at most {MAX_JSON}")
        return f.read()


def without_waiting(path: str, flags: int) -> int:
    """An opener for `open` that does not block on a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where it has a key twice, as readers differ in which of the two they use."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(key for key, _ in pairs)
        raise ValueError(f"{next(a for a, b in pairwise(names) if a == b)!r} is there twice")
    return found
