"""The machine that a figure was measured on, and what a child process takes of it."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of an x86-64 processor, that matter here


def machine() -> dict[str, Any]:
    """The hardware and the versions that a figure depends on."""
    cpu, features = platform.processor() or platform.machine(), []
    info = Path("/proc/cpuinfo")
    if info.exists():
        pairs = (line.partition(":") for line in info.read_text().splitlines())
        told = {name.strip(): value.strip() for name, _, value in pairs}
        cpu = told.get("model name", cpu)
        features = [name for name in FEATURES if name in told.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "safetensors"):
        module = sys.modules.get(name)
        if module is not None:
            versions[name] = module.__version__
    found = {"cpu": cpu, "features": features, "cores": len(os.sched_getaffinity(0)),
             "memory_gib": round(memory, 1), "versions": versions}  # fmt: skip
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def memory_read(turns: int = 3, nbytes: int = 1 << 30) -> float:
    """GB/s at which torch sums so many bytes on all its threads; the best turn's."""
    x = torch.ones(nbytes // 4)
    best = float("inf")
    for _ in range(turns):
        began = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - began)
    return nbytes / best / 1e9


def measure_child(
    command: list[str],
    output: Any = None,
    status: int = 0,
    errors: Any = subprocess.DEVNULL,
    every: float = 0.01,
    folder: str | None = None,
) -> dict[str, float]:
    """Runs a command, which has to end with that status: seconds, and its peak memory in MiB, whole (VmHWM of
    /proc/PID/status, mapped file pages included) and anonymous (RssAnon), both read every `every` seconds. `output`,
    `errors` and `folder` are Popen's stdout, stderr and cwd."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=output, stderr=errors, cwd=folder)
    peak = {"VmHWM": 0, "RssAnon": 0}
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]))
        time.sleep(every)
    if process.returncode != status:
        sys.exit(f"{' '.join(command)} failed with status {process.returncode}")
    seconds = round(time.monotonic() - began, 1)
    return {"seconds": seconds, "peak_mib": peak["VmHWM"] // 1024, "peak_anonymous_mib": peak["RssAnon"] // 1024}
