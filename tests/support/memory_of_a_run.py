"""Run by test_memory.py as a process of its own: loads a checkpoint, answers one prompt, and says as JSON what memory it
grew by and what the plan had said. Arguments: checkpoint, length of the prompt, tokens of a forward."""

import json
import sys
from pathlib import Path

import torch

from checkpoint.directory import Checkpoint
from checkpoint.load import load_into
from core.numerics import Numerics
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine import Engine, memory, setup
from model import Transformer
from ops.backend import choose_backend
from ops.formats import Weight


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


def main() -> None:
    torch.set_num_threads(1)
    folder, length, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ops = choose_backend(torch.device("cpu"), Numerics())
    ops.linear(torch.ones(8, 64).bfloat16(), ops.pack_weight(Weight(torch.ones(64, 64).bfloat16())))  # brings libraries in
    torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 4, 64, 32).bfloat16()] * 3, is_causal=True)
    before = resident("VmRSS")
    checkpoint = Checkpoint(folder)
    model = Transformer(checkpoint.args, Numerics(), mtp=checkpoint.has_mtp)
    load_into(model, checkpoint, progress=False)
    model.prepare()
    loaded = resident("VmRSS") - before
    config = RunConfig(max_model_len=length + 2, max_num_seqs=2, max_num_batched_tokens=tokens)
    engine = Engine(model, None, config)
    cached = resident("VmRSS") - before
    wanted = memory.need(setup.rank_of(model), config, engine.runner.cache.nbytes)
    peaks = [resident("VmHWM") - before]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    (request,) = engine.generate([[1] * length], SamplingParams(max_new_tokens=2))
    assert len(request.tokens) == 2, request.error
    peaks.append(resident("VmHWM") - before)
    print(
        json.dumps({"loaded": loaded, "cached": cached, "loading": peaks[0], "running": peaks[1], **wanted._asdict()})
    )


main()
