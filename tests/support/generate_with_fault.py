"""generate.py with something going wrong in one rank: generate_with_fault.py FAULT FLAGS…, FAULT in JSON:

  kind   "kill" or "stop" (signals to itself), "exception", "oom", or "nan" (in what it adds to a sum of the ranks)
  rank, at   in which rank (-1: in every one), and in which of its sums, counted from the first forward on
  file       where the time of the fault is written
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "inference"))

import torch

import generate
from parallel.group import Group

fault = json.loads(sys.argv.pop(1))
all_reduce, calls = Group.all_reduce, 0


def failing_all_reduce(self: Group, x: torch.Tensor) -> torch.Tensor:
    global calls
    calls += 1
    if fault["rank"] not in (self.process.rank, -1) or calls != fault["at"]:
        return all_reduce(self, x)
    Path(fault["file"]).write_text(str(time.time()))
    match fault["kind"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exception":
            raise RuntimeError("planted\nin two lines")
        case "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        case "nan":
            x.fill_(math.nan)
    return all_reduce(self, x)


Group.all_reduce = failing_all_reduce  # type: ignore[method-assign]
sys.exit(generate.main())
