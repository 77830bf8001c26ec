"""Run by test_devices.py as a process of its own: counts how often the host waits for the stand-in device in steps that
decode, and says it as JSON.

Arguments: a checkpoint, and JSON with prompts, and fields of RunConfig and SamplingParams for each way. Recorded
forwards are run again, uncounted: a CUDA graph asks nothing.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from core import devices
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine import setup
from engine.engine import Engine
from parallel.group import SOLO
from support import standin_device


def capture(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def replay() -> torch.Tensor:
        before = list(standin_device.waits)
        result = run()
        standin_device.waits[:] = before
        return result

    return replay


def count(checkpoint: str, prompts: list[list[int]], run: dict[str, Any], sampling: dict[str, Any]) -> list[list[str]]:
    """Of each step after the first token of all prompts what waited."""
    config = RunConfig(n_pages=40, max_num_seqs=len(prompts), max_model_len=256, device="standin", **run)
    model, tokenizer, _, _ = setup.load(
        checkpoint, config, config=None, device=None, world=SOLO, progress=False, chat=False, thinking=None
    )
    engine = Engine(model, tokenizer, config, capture=capture)
    params = SamplingParams(max_new_tokens=5, ignore_eos=True, **sampling)
    requests = [engine.add(prompt, params) for prompt in prompts]
    while not all(request.tokens for request in requests):
        engine.step()
    found = []
    while engine.busy:
        standin_device.waits.clear()
        engine.step()
        found.append(list(standin_device.waits))
    return found


def main() -> None:
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[2])
    devices.copies_later = lambda device: torch.device(device).type == "standin"
    torch.Tensor.pin_memory = lambda x: standin_device.pinned.pin(x)  # type: ignore[method-assign, assignment]
    with standin_device.registered():
        json.dump([count(sys.argv[1], asked["prompts"], *way) for way in asked["ways"]], sys.stdout)


main()
