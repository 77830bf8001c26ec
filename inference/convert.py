"""Converts a Hugging Face checkpoint into one set of files for each tensor-parallel rank.

    python convert.py --hf-ckpt-path /path/to/DeepSeek-V3 --save-path /path/to/DeepSeek-V3-Demo --model-parallel 16

writes, for each rank, `model{rank}-mp{N}.safetensors`, or parts `…-00001-of-0000K.safetensors` of at most 1.5 GiB (a
single larger tensor gets a part of its own), then `model-mp{N}.index.json`, the manifest (see checkpoint/manifest.py).
With `--pipeline-parallel S` the files of each stage's ranks hold its layers alone: `model{rank}-mp{N}-pp{stage}…`.
FP8 weights and their scales stay as they are, byte for byte; the MTP module is kept; config, tokenizer and chat
template files are copied.

    python convert.py --verify /path/to/DeepSeek-V3-Demo

reads everything back and compares it with the manifest.

Nothing is readable before everything is: files carry temporary names until all are durable, and the manifest is what
makes them a checkpoint. An earlier conversion in the same directory stays readable until that very moment. The same
command resumes a run that was cut short: finished files are not written again. Memory does not depend on the size of
the checkpoint or the number of ranks.
"""

if __name__ == "__main__":
    from cli.interrupts import end_process_on_interrupt

    end_process_on_interrupt()

import argparse
import sys
from pathlib import Path

from cli.flags import output_errors
from cli.main import run_command


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hf-ckpt-path", type=Path, help="directory of the Hugging Face checkpoint")
    parser.add_argument("--save-path", type=Path, help="directory for the converted files")
    parser.add_argument("--n-experts", type=int, help="number of routed experts, checked against config.json")
    parser.add_argument("--model-parallel", type=int, help="number of ranks, in a pipeline of each stage")
    parser.add_argument(
        "--pipeline-parallel", type=int, default=1, metavar="S", help="pipeline stages, each with some of the layers"
    )
    parser.add_argument(
        "--pp-layers", metavar="LAYERS", help="layers of each stage, such as 20,21,20 (default: balanced by cost)"
    )
    parser.add_argument(
        "--experts",
        choices=("auto", "whole", "split"),
        default="auto",
        help="a rank gets some routed experts whole, or a share of each (default: split where their width divides)",
    )
    parser.add_argument("--verify", type=Path, metavar="DIR", help="instead: compare a directory with its manifest")
    options = parser.parse_args(arguments)
    wanted = (options.hf_ckpt_path, options.save_path, options.model_parallel)
    if sum(value is not None for value in wanted) != (len(wanted) if options.verify is None else 0):
        parser.error("give --hf-ckpt-path, --save-path and --model-parallel, or --verify alone")
    if options.pipeline_parallel < 1:
        parser.error(f"--pipeline-parallel is {options.pipeline_parallel}, expected at least 1")
    if options.pp_layers is not None and options.pipeline_parallel == 1:
        parser.error("--pp-layers needs --pipeline-parallel")
    return options


def run(options: argparse.Namespace) -> int:
    """Converts or verifies; returns the exit status. Raises UserError."""
    from checkpoint.convert import convert
    from checkpoint.manifest import verify_command

    if options.verify:
        with output_errors():
            return verify_command(options.verify)
    convert(
        options.hf_ckpt_path, options.save_path, options.model_parallel, options.n_experts, experts=options.experts,
        n_stages=options.pipeline_parallel, layers=options.pp_layers,
    )  # fmt: skip
    return 0


def main() -> int:
    return run_command(parse, run)


if __name__ == "__main__":
    sys.exit(main())
