"""Run by test_devices.py as a process of its own: answers prompts on the stand-in device, once for each way, and says as
JSON how.

Arguments: the checkpoint, and JSON with prompts and a list of ways: fields of RunConfig, and besides them dtypes that the
device lacks, its free memory, and whether torch has collectives for it.
"""

import json
import sys
from typing import Any

import torch

from core import devices
from core.errors import UserError
from core.sampling_params import SamplingParams
from engine.engine import Engine
from parallel import startup
from parallel.group import Group
from support import standin_device


def run(checkpoint: str, prompts: list[list[int]], tp: Group, lacks: list[str], memory: list[int], **config: Any) -> dict:
    standin_device.lacks.clear()
    standin_device.lacks |= {getattr(torch, name) for name in lacks}
    standin_device.memory[:] = memory
    devices.holds.cache_clear()
    try:
        engine = Engine.from_pretrained(checkpoint, world=tp, progress=True, device="standin", **config)
    except UserError as e:
        return {"error": str(e)}
    places = {str(t.device) for t in (*engine.model.parameters(), *engine.model.buffers(), engine.runner.cache)}
    answers = []
    if tp.rank == 0:
        params = SamplingParams(temperature=0.8, seed=7, max_new_tokens=5, logprobs=2)
        answers = [request.tokens for request in engine.generate(prompts, params)]
        engine.close()
    else:
        engine.serve()
    return {
        "answers": answers,
        "devices": sorted(places),
        "backend": type(engine.model.ops).__name__,
        "through_host": tp.through_host,
        "dtype": str(engine.model.num.dtype),
        "ops": len(standin_device.seen),
    }


def main() -> None:
    torch.set_num_threads(1)
    checkpoint, asked = sys.argv[1], json.loads(sys.argv[2])
    with standin_device.registered() as device:
        host = startup.join(30)
        for way in asked["ways"]:
            if way.pop("no_collectives", False):
                startup.collectives_of = lambda device: None
            tp = startup.on(device, host)
            print(json.dumps(run(checkpoint, asked["prompts"], tp, way.pop("lacks", []), way.pop("memory", [1 << 32]), **way)))
        host.shutdown()


main()
