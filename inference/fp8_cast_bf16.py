"""Turns an FP8 Hugging Face checkpoint into a BF16 one: every weight times its block scales, rounded once.

    python fp8_cast_bf16.py --input-fp8-hf-path /path/to/fp8_weights --output-bf16-hf-path /path/to/bf16_weights

The weight files keep their names; the scales are left out, and the index is rewritten without them; config.json loses
its quantization_config; everything else in the directory is copied. Memory does not depend on the checkpoint's size.

What it writes becomes the checkpoint of its directory at one moment (see checkpoint/commit.py); an earlier one loads
until then. Programs that know nothing of manifests find no index (of a single file: no file) while files get their
names. The same command resumes a run that was cut short. To compare a directory with its manifest:

    python fp8_cast_bf16.py --verify /path/to/bf16_weights
"""

if __name__ == "__main__":
    from cli.interrupts import end_process_on_interrupt

    end_process_on_interrupt()

import argparse
import sys
from pathlib import Path

from cli.flags import device, output_errors
from cli.main import run_command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input-fp8-hf-path", type=Path, help="directory of the FP8 checkpoint")
    parser.add_argument("--output-bf16-hf-path", type=Path, help="directory for the BF16 checkpoint")
    parser.add_argument("--device", type=device, default="auto", help="where to dequantise (default: a GPU if any)")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="instead: compare a directory with its manifest")
    options = parser.parse_args(arguments)
    wanted = (options.input_fp8_hf_path, options.output_bf16_hf_path)
    if sum(value is not None for value in wanted) != (len(wanted) if options.verify is None else 0):
        parser.error("give --input-fp8-hf-path and --output-bf16-hf-path, or --verify alone")
    return options


def run(options: argparse.Namespace) -> int:
    """Casts or verifies; returns the exit status. Raises UserError."""
    from checkpoint.cast import cast
    from checkpoint.manifest import verify_command

    if options.verify:
        with output_errors():
            return verify_command(options.verify)
    cast(options.input_fp8_hf_path, options.output_bf16_hf_path, options.device)
    return 0


def main() -> int:
    return run_command(parse, run)


if __name__ == "__main__":
    sys.exit(main())
