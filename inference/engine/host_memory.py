"""What a host and its container leave free, as Linux tells it; elsewhere, from what a host has."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that programs may take without swapping, by the kernel's estimate; where it makes none, three quarters of
    the host's memory, and 4 GiB where that is not known either."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4 * 3
        except (AttributeError, OSError, ValueError):  # Windows has no sysconf
            return 4 << 30
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


# The kernel's files, under cgroups of version 2 and 1: where, limit, usage, and in memory.stat the cache that can go
_CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def container_memory(root: Path = Path("/")) -> Iterator[int]:
    """Bytes that each memory limit of the control groups that this process is in leaves."""
    try:
        groups = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for controllers, path in groups:
        if controllers not in _CGROUPS:
            continue
        base, limit, usage, cache = _CGROUPS[controllers]
        inner = root / base / path.lstrip("/")
        for folder in (inner, *(up for up in inner.parents if up.is_relative_to(root / base))):
            with contextlib.suppress(OSError, ValueError):  # not there, not to be read, or "max"
                most = int((folder / limit).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield max(0, most - int((folder / usage).read_text()) + int(stat.get(cache, 0)))
