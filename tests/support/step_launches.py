"""What one rank of DeepSeek-V3 launches in a step, from the stub driver; prints JSON. A program of its own, because Triton's
interpreter, in which the other tests run, takes the place of the compiler.

    python tests/support/step_launches.py                 counts by kernel, those of a layer in order, the compilations
    python tests/support/step_launches.py --sample        what sampling launches, and has the host wait for
    python tests/support/step_launches.py --compile       compiles some configurations, and launches them twice

The rank is one of eight of configs/config_671B.json, W8A8, on tensors without memory; a collective counts as one launch.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.runtime.errors import OutOfResources

from core import devices
from core.batch import Batch
from core.config import ModelArgs, load_config
from core.numerics import Numerics
from core.run_config import PAGE_SIZE
from core.sampling_params import SamplingParams
from engine.row_sampler import RowSampler
from engine.sampling import Scores, propose, verify
from engine.sampling_state import SamplingState
from model import Transformer
from ops.gpu import gemm, moe, tiles
from ops.gpu.backend import GpuBackend
from parallel.group import Group
from support import compile_kernels, standin_device, stub_driver
from support.kernel_configurations import configurations, gemm_configuration
from support.stub_driver import Launch, StubGpu

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "config_671B.json"
# By name: sequences, new tokens of each, tokens cached before them.
STEPS = {
    "decode 1": (1, 1, 4096), "decode 8": (8, 1, 4096), "decode 32": (32, 1, 4096), "decode 128": (128, 1, 4096),
    "prefill 4096": (1, 4096, 0),
}  # fmt: skip


@dataclass(frozen=True)
class NotedCollectives(Group):
    """One rank of several without the others: a collective is noted as a launch."""

    gpu: Any = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self._note("all_reduce", x, x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(*x.shape[:-1], x.shape[-1] * self.size)
        self._note("all_gather", x, out)
        return out

    def _note(self, name: str, *tensors: torch.Tensor) -> None:
        shapes = {str(i): stub_driver.shape_of(t) for i, t in enumerate(tensors)}
        self.gpu.launches.append(Launch(name, arguments=shapes, stream=self.gpu.stream))


def rank_of_eight(gpu: StubGpu, args: ModelArgs | None = None, **numerics: Any) -> Transformer:
    """Prepared, without weights."""
    args = args or load_config(CONFIG)
    num = Numerics(torch.bfloat16, "fp8", args.scale_fmt, experts="split", **numerics)
    return Transformer(args, num, NotedCollectives(0, 8, gpu=gpu), "meta", backend=GpuBackend(False)).prepare()


def batch_of(n: int, new: int, context: int) -> tuple[Batch, int]:
    """n sequences of `new` tokens after `context` cached ones, and how many pages they have in all."""
    per = math.ceil((context + new) / PAGE_SIZE)
    slices = [([0] * new, context, list(range(i * per, (i + 1) * per))) for i in range(n)]
    return Batch.pack(slices, "meta"), n * per


def step_of(model: Transformer, n: int, new: int, context: int) -> Callable[[], torch.Tensor]:
    """The forward, the logits of the rows that are sampled, and the greedy choice."""
    batch, n_pages = batch_of(n, new, context)
    cache = model.new_cache(n_pages)
    return lambda: model.logits(model(batch, cache)[new - 1 :: new]).argmax(-1)


def layers_of(gpu: StubGpu, model: Transformer, step: Callable[[], Any]) -> dict[str, list[Launch]]:
    """All launches of a step, in order, and apart those of a dense layer and of a layer of experts."""
    found: dict[str, list[Launch]] = {}
    began: dict[str, int] = {}
    hooks = []
    for kind, i in (("dense", 0), ("moe", len(model.layers) - 1)):
        layer = model.layers[i]
        hooks.append(layer.register_forward_pre_hook(lambda *_, kind=kind: began.update({kind: len(gpu.launches)})))
        hooks.append(
            layer.register_forward_hook(lambda *_, kind=kind: found.update({kind: gpu.launches[began[kind] :]}))
        )
    gpu.launches.clear()
    step()
    for hook in hooks:
        hook.remove()
    return found | {"step": list(gpu.launches)}


def counted() -> dict[str, Any]:
    """By step: launches by name; the names of a layer's on the main stream, in order; how many are on the side stream; and of each kernel of ours whether it is launched as a dependent of the one before."""
    with stub_driver.installed() as gpu:
        model = rank_of_eight(gpu)
        steps = {}
        for name, shape in STEPS.items():
            found = layers_of(gpu, model, step_of(model, *shape))
            chains = {kind: [launch.name for launch in found[kind] if not launch.stream] for kind in ("dense", "moe")}
            counts: dict[str, int] = {}
            for launch in found["step"]:
                counts[launch.name] = counts.get(launch.name, 0) + 1
            steps[name] = {
                "launches": len(found["step"]), "side": sum(launch.stream for launch in found["step"]),
                "counts": counts, "chains": chains,
                "dependent": {launch.name: bool(launch.options.get("launch_pdl")) for launch in found["step"] if launch.ours},
            }  # fmt: skip
        return {"steps": steps, "compilations": gpu.compilations}


def listed() -> dict[str, str]:
    """The configurations of kernel_configurations.py for this GPU, by the key of what compiling one leaves in the cache."""
    found = {}
    for c in configurations():
        if c.target == "sm_90":
            source, target = compile_kernels.source_of(c)
            backend = stub_driver.make_backend(target)
            found[stub_driver.cache_key(source, backend, backend.parse_options(dict(c.options)))] = c.name
    return found


def compiled_beforehand() -> dict[str, Any]:
    """Compiles two configurations as compile_kernels.py does and launches them as the ops do, in two "processes"; and
    says what the driver refuses."""
    tile = next(t for op, target, t in tiles.reachable() if (op, target) == ("fp8_gemm", "sm_90") and t.persistent)
    wanted = [gemm_configuration("fp8_gemm", "sm_90", tile)]
    wanted += [c for c in configurations(moe) if c.name == "combine sm_90"]
    for c in wanted:
        compile_kernels.compile_(c)
    found: dict[str, Any] = {"compiled": len(wanted), "refused": []}
    for run in ("first", "second"):
        with stub_driver.installed(compiles=True) as gpu:
            launch_product(tile)
            launch_combine(moe.COMBINE_COLUMNS)
            found[run] = {"hits": gpu.hits, "compilations": len(gpu.compilations), "allocated": gpu.allocated}
    room = {"max_shared_mem": 64 << 10}
    with mock.patch.dict(stub_driver.PROPERTIES, room), stub_driver.installed(compiles=True):
        for refused in (
            lambda: stub_driver.packed_argument("x_ptr", "*bf16", 5, None),
            lambda: stub_driver.packed_argument("M", "i32", 1 << 31, None),
            lambda: launch_combine(moe.COMBINE_COLUMNS << 16),
            lambda: launch_product(tile),
        ):
            try:
                refused()
            except (TypeError, OverflowError, RuntimeError, OutOfResources) as e:
                found["refused"].append(str(e))
    return found


def launch_product(tile: tiles.Tile) -> None:
    m, n, k = 256, 512, 1024
    x, w = (torch.empty(rows, k, dtype=torch.float8_e4m3fn, device="meta") for rows in (m, n))
    x_s, w_s = (torch.empty(rows, k // 128, device="meta") for rows in (m, n // 128))
    gemm.gemm(x, x_s, w, w_s, torch.bfloat16, tile)


def launch_combine(width: int) -> None:
    y = torch.empty(8, width, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(1, 8, dtype=torch.int64, device="meta")
    moe.combine(y, torch.empty(1, 8, device="meta"), ids, 0, 256, y[:1])


def sampled() -> dict[str, Any]:
    """With temperature and top-p: launches of tokens after drafts or without, and of proposals, and what waited."""
    vocab, params = 256, SamplingParams(temperature=0.7, top_p=0.95)
    devices.copies_later = lambda device: torch.device(device).type == "standin"
    torch.Tensor.pin_memory = lambda x: standin_device.pinned.pin(x)  # type: ignore[method-assign, assignment]
    found: dict[str, Any] = {}
    with standin_device.registered() as device:
        parts = [(torch.zeros(n, vocab, device=device), torch.zeros(2, n, dtype=torch.int64, device=device)) for n in (64, 8)]
        with stub_driver.installed() as gpu:
            states = [SamplingState(params, n, [1, 2, 3], 1) for n in range(32)]
            row_sampler = RowSampler(GpuBackend())
            rows = Scores([(*parts[0], range(32))])
            apart = Scores([(*parts[0], range(0, 64, 2)), (*parts[1], range(8))])  # of a graph's buffers, and eager
            others = [SamplingState(params, 100 + n, [1, 2, 3], 1) for n in range(40)]
            for name, work in {
                "tokens": lambda: verify(rows, states, row_sampler),
                "proposals": lambda: propose(rows, states, row_sampler),
                "drafts": lambda: verify(Scores([(*parts[0], range(64))]), states, row_sampler),
                "in two places": lambda: verify(apart, others, row_sampler),
            }.items():
                gpu.launches.clear()
                standin_device.waits.clear()
                work()
                found[name] = {"launches": [launch.name for launch in gpu.launches], "waits": list(standin_device.waits)}
    return found


def main() -> None:
    if sys.argv[1:] == ["--sample"]:
        json.dump(sampled(), sys.stdout)
        return
    if sys.argv[1:] == ["--compile"]:
        json.dump(compiled_beforehand(), sys.stdout)
        return
    json.dump({"triton": triton.__version__, "listed": listed()} | counted(), sys.stdout)


if __name__ == "__main__":
    main()
