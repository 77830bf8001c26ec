"""This engine behind the conformance suite's protocol: a checkpoint and token ids to logits and named activations.

python conformance/check_port.py --format bfloat16 --command "python conformance/adapters/engine.py --mode cpu"
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))
from checkpoint.directory import Checkpoint
from checkpoint.load import load_into
from checkpoint.table import exceptions
from core.batch import Batch
from core.numerics import Numerics
from core.run_config import PAGE_SIZE
from model import Transformer
from ops.reference_backend import ReferenceBackend

MODES = {  # a mode, and the suite's format for it
    "float32": "float32", "reference": "bfloat16", "cpu": "bfloat16", "w8a8": "w8a8", "w8a8-bfloat16": "w8a8-bfloat16",
}  # fmt: skip


def answer(folder: Path, tokens: list[int], mode: str, points: bool = False) -> dict[str, Tensor]:
    """Logits (T, V), and of the MTP module (T - 1, V), of a prompt; with `points` every named activation."""
    checkpoint = Checkpoint(folder)
    args = checkpoint.args
    assert args is not None
    num = Numerics(torch.float32 if mode in ("float32", "w8a8") else torch.bfloat16)
    if mode.startswith("w8a8") and args.dtype == "fp8":
        num = replace(num, gemm="fp8", scale_fmt=args.scale_fmt)
    num = replace(num, exceptions=exceptions(checkpoint.expected(args), num))
    backend: Any = None if mode == "cpu" else ReferenceBackend()
    model = Transformer(args, num, mtp=checkpoint.has_mtp, backend=backend)
    load_into(model, checkpoint, progress=False)
    model.prepare()
    if points:
        from verification.recorder import record_tokens

        return dict(record_tokens(model, [tokens]).requests[0].points)
    pages = list(range(-(-len(tokens) // PAGE_SIZE)))
    cache = model.new_cache(len(pages))
    hidden = model(Batch.pack([(tokens, 0, pages)]), cache)
    found = {"logits": model.logits(hidden)}
    if checkpoint.has_mtp:
        drafted = model.draft(Batch.pack([(tokens[1:], 0, pages)]), hidden[:-1], cache)
        found["mtp.0.logits"] = model.logits(drafted)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    help = "reference: plain torch in bfloat16; cpu: compiled C in bfloat16; the others: plain torch (default: float32)"
    parser.add_argument("--mode", choices=MODES, default="float32", help=help)
    parser.add_argument("--points", action="store_true", help="write every named activation")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    tokens = json.loads(options.input.read_text())["tokens"]
    found = answer(options.checkpoint, tokens, options.mode, options.points)
    save_file({name: t.contiguous() for name, t in found.items()}, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
