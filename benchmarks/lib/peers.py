"""The V3 repository's code as a contestant, in a process of its own: its modules have the names of ours."""

import sys
from pathlib import Path

import torch

from lib.child import Child

HERE = Path(__file__).parent
V3 = HERE.parents[1] / ".peers" / "DeepSeek-V3" / "inference"


class Peer(Child):
    """The V3 repository's code in a process of its own: its modules have the names of ours."""

    def __init__(self, root: Path, device: torch.device, limit: float = 580.0):
        super().__init__([sys.executable, str(HERE / "peer_v3.py"), str(root), str(device)], limit)


def find_v3(path: str | None, device: torch.device) -> Peer | None:
    """The V3 repository's `inference` folder as a peer; None, and a line that says so, where it is not."""
    root = Path(path) if path else V3
    if not (root / "kernel.py").exists():
        print(f"The V3 repository is not at {root}: its column is left out (see the top of kernel_gpu.py).")
        return None
    return Peer(root, device)
