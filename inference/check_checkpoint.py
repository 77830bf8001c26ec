"""Checks a checkpoint: index, files and tensors against each other and the config, and every value that it holds.

    python check_checkpoint.py /path/to/DeepSeek-V3            # reads every byte
    python check_checkpoint.py /path/to/DeepSeek-V3 --quick    # headers alone, in seconds

takes what generate.py takes: a Hugging Face directory, one that convert.py wrote, or one that the original repository's
converter wrote (with --config). The rules on headers are the loader's own. What is added here needs all bytes: values
that are not finite, weights of zeros, scales that are no powers of two where the config promises them, copies that
differ. All faults are reported, not only the first. Memory does not depend on the checkpoint's size.

Exit status: 0 no faults (there may be warnings); 1 faults; 2 wrong use.
"""

if __name__ == "__main__":
    from cli.interrupts import end_process_on_interrupt

    end_process_on_interrupt()

import argparse
import json
import sys
from pathlib import Path

from cli.flags import output_errors
from cli.main import discard_output, run_command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="directory of the checkpoint")
    parser.add_argument("--quick", action="store_true", help="headers alone, no weights or scales: takes seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the model's config, where the directory has none")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Checks and reports; returns the exit status. Raises UserError."""
    import torch

    from checkpoint.check import check

    torch.set_num_threads(1)  # the check has threads of its own
    report = check(options.checkpoint, options.quick, options.config)
    try:
        with output_errors():
            print(json.dumps(report.as_json(), indent=1) if options.json else "\n".join(report.lines()), flush=True)
    except BrokenPipeError:  # the reader of our output has gone
        discard_output()
    return 0 if report.ok else 1


def main() -> int:
    return run_command(parse, run)


if __name__ == "__main__":
    sys.exit(main())
