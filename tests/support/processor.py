"""What this processor's instructions are."""

from pathlib import Path

INFO = Path("/proc/cpuinfo")
FEATURES = set(INFO.read_text().partition("\nflags")[2].split("\n")[0].split()) if INFO.exists() else set()
