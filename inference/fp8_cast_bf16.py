"""Turns an FP8 Hugging Face checkpoint into a BF16 one: every weight times its block scales, rounded once.

    python fp8_cast_bf16.py --input-fp8-hf-path /path/to/fp8_weights --output-bf16-hf-path /path/to/bf16_weights

The shard files keep their names; the scales, wherever they lie, go, and the index is rewritten without them;
config.json loses its quantization_config; everything else in the directory is copied. Memory does not depend on the
checkpoint's size.

What it writes becomes the checkpoint of its directory at one moment (see manifest.py); an earlier one loads until then.
Programs that know nothing of manifests find no index (of a single file: no file) while files take their names. A run
that was cut short is taken up by the same command. To compare a directory with its manifest:

    python fp8_cast_bf16.py --verify /path/to/bf16_weights
"""

import argparse
import sys
from pathlib import Path

from cli import interrupts

# isort: split
import torch
from tqdm import tqdm

from checkpoint.manifest import (
    CAST_MARK,
    HF_INDEX,
    Source,
    check_target,
    commit,
    finish_pending,
    needed,
    verify_command,
    versions,
)
from checkpoint.tensorfile import Entry, Reader, Staging, Writer, small_files
from checkpoint.weights import Checkpoint
from core.config import BLOCK_SIZE
from core.errors import UserError
from core.files import read_json
from core.numerics import Numerics
from ops.backend import choose_backend

SCALE = "_scale_inv"


def cast(source: Path, target: Path, device: torch.device) -> None:
    """Writes the BF16 form of `source` to `target`, dequantising on `device`.

    Raises UserError, before a byte of the target is written, for a damaged checkpoint, a weight without its scale, a
    checkpoint that is not FP8, or a target that cannot take it.
    """
    checkpoint = Checkpoint(source)
    if checkpoint.kind != "hf":
        raise UserError(f"{source}: already converted for ranks; give the Hugging Face checkpoint")
    if checkpoint.args is None:
        raise UserError(f"{source / 'config.json'}: missing")
    if checkpoint.args.dtype != "fp8" and not checkpoint.quantised:
        raise UserError(f"{source}: holds no FP8 weights, so there is nothing to cast")
    if target.resolve() == source.resolve():
        raise UserError(f"{target}: the output cannot go where the checkpoint is")
    made_from = Source(source, checkpoint.files)
    checkpoint.check(checkpoint.args)
    entries = checkpoint.on_disk()
    config = read_json(source / "config.json")
    del config["quantization_config"]
    if "dtype" not in config:  # as transformers 5 spells it
        config["torch_dtype"] = "bfloat16"

    with Staging(target, needed) as staging:
        check_target(target, CAST_MARK, config)
        finish_pending(staging)
        files = lay_out(entries, staging)
        copies = [path for path in small_files(source) if path.name != "config.json"]
        staging.resume([made_from.state, made_from.facts, versions(), device.type])
        staging.require(sum(path.stat().st_size for path in copies))
        write(entries, files, device)
        small = [staging.copy(path) for path in copies]
        staging.write_json("config.json", config)
        old = [path.name for path in target.glob("*.safetensors") if not path.name.startswith(".")]
        if list(files) == ["model.safetensors"]:
            old.append(HF_INDEX)
        else:
            weight_map = {name: file for file, writer in files.items() for name in writer.starts}
            total = sum(writer.body for writer in files.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            staging.write_json(HF_INDEX, index)
            small.append(HF_INDEX)
        commit(staging, made_from, None, "whole", [*small, "config.json"], old)


def lay_out(entries: dict[str, Entry], staging: Staging) -> dict[str, Writer]:
    """The output files by name, with the tensors of the source's files of the same names but the scales."""
    files: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, entry in entries.items():
        if not name.endswith(SCALE):
            dtype = torch.bfloat16 if entry.dtype == torch.float8_e4m3fn else entry.dtype
            files.setdefault(entry.file.name, {})[name] = dtype, entry.shape
    return {file: staging.writer(file, tensors, CAST_MARK) for file, tensors in sorted(files.items())}


def write(entries: dict[str, Entry], files: dict[str, Writer], device: torch.device) -> None:
    """Fills the output files that are not finished one after the other, a window of whole blocks at a time."""
    order = sorted((e for e in entries.values() if not e.name.endswith(SCALE)), key=lambda e: (e.file, e.start))
    backend = choose_backend(device, Numerics(torch.float32))  # float32: weight_dequant alone needs no C compiler
    missing = [e for e in order if files[e.file.name].missing]
    total = sum(e.nbytes for e in order)
    bar = tqdm(total=total, initial=total - sum(e.nbytes for e in missing), unit="B", unit_scale=True, desc="casting")
    with bar, Reader() as reader, Reader() as scales:
        for entry in missing:
            fp8 = entry.dtype == torch.float8_e4m3fn
            scale = scales.read(entries[entry.name + SCALE]) if fp8 else None
            for row, window in reader.rows(entry, step=BLOCK_SIZE):
                at = row * entry.row_bytes
                if scale is not None:
                    q = window.view(entry.dtype).to(device)
                    s = scale[row // BLOCK_SIZE :][: -(-len(q) // BLOCK_SIZE)].to(device)
                    window, at = backend.weight_dequant(q, s, torch.bfloat16).cpu(), 2 * at
                files[entry.file.name].write(entry.name, window, at)
                bar.update(len(window) * entry.row_bytes)


def choose_device(name: str) -> torch.device:
    """auto: a GPU if there is one. Raises UserError when one is asked for and missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that this build of torch can use")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def main() -> int:
    interrupts.heed()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input-fp8-hf-path", type=Path, help="directory of the FP8 checkpoint")
    parser.add_argument("--output-bf16-hf-path", type=Path, help="directory for the BF16 checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to dequantise")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="instead: compare a directory with its manifest")
    options = parser.parse_args()
    wanted = (options.input_fp8_hf_path, options.output_bf16_hf_path)
    if sum(value is not None for value in wanted) != (len(wanted) if options.verify is None else 0):
        parser.error("give --input-fp8-hf-path and --output-bf16-hf-path, or --verify alone")
    try:
        if options.verify:
            return verify_command(options.verify)
        cast(*wanted, choose_device(options.device))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
