"""Checks a checkpoint: index, files and tensors against each other and the config, and every value that it holds.

    python check_checkpoint.py /path/to/DeepSeek-V3            # reads every byte
    python check_checkpoint.py /path/to/DeepSeek-V3 --quick    # headers alone, in seconds

takes what generate.py takes: a Hugging Face directory, one that convert.py wrote, or one that the original repository's
converter wrote (with --config). The rules on headers are the loader's own. What is added here needs all bytes: values
that are not finite, weights of zeros, scales that are no powers of two where the config promises them, copies that
differ. All faults are reported, not only the first. Memory does not depend on the checkpoint's size.

Exit status: 0 no faults (there may be warnings); 1 faults; 2 wrong use.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from cli import interrupts

# isort: split
from core.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of the checkpoint")
    parser.add_argument("--quick", action="store_true", help="headers alone, no weights or scales: takes seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the model's config, where the directory has none")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

    import torch  # takes seconds

    from checkpoint.check import check

    interrupts.heed()
    torch.set_num_threads(1)  # the check has threads of its own
    try:
        report = check(options.checkpoint, options.quick, options.config)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        print(json.dumps(report.as_json(), indent=1) if options.json else "\n".join(report.lines()), flush=True)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
