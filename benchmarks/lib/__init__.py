"""What the benchmarks share. Importing it puts inference/ and demo/ on the path, behind everything else: in the process
of a peer, modules of the same names come first."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INFERENCE = ROOT / "inference"
CONFIGS = ROOT / "configs"
sys.path += [folder for folder in map(str, (INFERENCE, ROOT / "demo")) if folder not in sys.path]
