"""What this processor's instructions are, and how the C kernels are compiled for others."""

from pathlib import Path

from ops.cpu import kernels

INFO = Path("/proc/cpuinfo")
FEATURES = set(INFO.read_text().partition("\nflags")[2].split("\n")[0].split()) if INFO.exists() else set()


def flags_for(*march: str) -> tuple[str, ...]:
    """The kernels' flags with these in place of -march=native."""
    return tuple(flag for given in kernels.FLAGS for flag in (march if given == kernels.NATIVE[0] else [given]))
