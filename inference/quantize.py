"""Quantises a Hugging Face checkpoint: linear layers to FP8, or routed experts to INT4 or INT8.

    python quantize.py --hf-ckpt-path /path/to/DeepSeek-V2-Lite --save-path /path/to/DeepSeek-V2-Lite-FP8 --format fp8
    python quantize.py --hf-ckpt-path /path/to/DeepSeek-V3 --save-path /path/to/DeepSeek-V3-INT4 --format int4

fp8 makes e4m3 in 128x128 blocks of plain weights, in the layers where DeepSeek-V3's release has it: the reverse of
fp8_cast_bf16.py. int4 and int8 take plain or FP8 weights and lay the routed experts' out as compressed-tensors does
("pack-quantized"), symmetric, a BF16 scale for a group of 32 or 128 weights; the other layers' FP8 weights become BF16.
The MTP module is quantised as the other layers are. Everything else is copied; config.json says what was done.

Memory does not depend on the checkpoint's size. What is written becomes the checkpoint of its directory at one moment
(see checkpoint/commit.py); the same command resumes a run that was cut short. To compare a directory with its manifest:

    python quantize.py --verify /path/to/DeepSeek-V3-INT4
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
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n")[0])).add_argument
    add("--hf-ckpt-path", type=Path, help="directory of the Hugging Face checkpoint, in BF16, FP16, FP32 or FP8")
    add("--save-path", type=Path, help="directory for the quantised checkpoint")
    add("--format", choices=("fp8", "int4", "int8"), help="of the linear layers (fp8) or of the routed experts")
    add("--group-size", type=int, help="weights that share a scale: 32 or 128 (default: int4 32, int8 128)")
    add("--device", type=device, default="auto", help="where to quantise (default: a GPU if any)")
    add("--verify", type=Path, metavar="DIR", help="instead: compare a directory with its manifest")
    options = parser.parse_args(arguments)
    wanted = (options.hf_ckpt_path, options.save_path, options.format)
    if sum(value is not None for value in wanted) != (len(wanted) if options.verify is None else 0):
        parser.error("give --hf-ckpt-path, --save-path and --format, or --verify alone")
    return options


def run(options: argparse.Namespace) -> int:
    """Quantises or verifies; returns the exit status. Raises UserError."""
    from checkpoint.manifest import verify_command
    from checkpoint.quantize import quantize

    if options.verify:
        with output_errors():
            return verify_command(options.verify)
    quantize(options.hf_ckpt_path, options.save_path, options.format, options.group_size, options.device)
    return 0


def main() -> int:
    return run_command(parse, run)


if __name__ == "__main__":
    sys.exit(main())
