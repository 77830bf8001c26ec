"""Devices other than CPUs and GPUs: where the code may name a kind, what the flags answer, and a whole run on a stand-in
that is as strict as an accelerator."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import generate
from checkpoint import reading
from checkpoint.atomic import AtomicWriter
from core import devices
from core.config import ModelArgs
from core.errors import UserError
from core.numerics import Numerics
from core.run_config import RunConfig
from core.sampling_params import SamplingParams
from engine import host_memory, rank_memory, setup
from engine.choose_numerics import choose_numerics
from engine.engine import Engine
from ops import backend
from ops.reference_backend import ReferenceBackend
from parallel import startup
from parallel.group import Group
from support.families import V3
from support.model_pairs import ours
from support.processes import environment, free_port, make_tiny, rank_environment

parse = ModelArgs.from_hf
ROOT = Path(__file__).parents[2]
# How often a file may name a kind of device at most, and for what. ops/gpu, which is for GPUs alone, is not counted.
NAMED = {
    "core/devices.py": 13,  # the place for it
    "core/run_config.py": 1,  # a server's budget on CPUs
    "check_network.py": 1,  # NCCL or gloo
    "parallel/network.py": 1,  # gloo besides NCCL
    "parallel/network_facts.py": 1,  # CPUs have no product name worth comparing
    "parallel/network_probe.py": 4,  # gloo or NCCL, and how long its work takes
    "parallel/startup.py": 7,  # --device auto; one-shot sums on GPUs
    "parallel/group.py": 4,  # CPUs record what they sum; sums and hidden states by way of the host
    "ops/backend.py": 7,  # the choice of kernels
    "ops/cpu/kernels.py": 1,  # C is given the host's tensors
    "engine/setup.py": 3,  # the note about C; the host's memory
    "engine/choose_numerics.py": 4,  # which products of quantised weights there are
    "engine/graphs.py": 8,  # CUDA graphs
    "engine/runner.py": 1,  # sampling, where there is float64
    "ops/distributions.py": 1,  # CPUs look before they sort
    "model.py": 1,  # where tensors are, unless somebody says
    "plan.py": 6,  # GPUs that are not here
    "checkpoint/cast.py": 1,  # from a device to a file
    "checkpoint/quantize.py": 2,  # the same
    "ops/weight_quant.py": 1,  # a table on the CPU
}


def names_of_devices(source: str) -> int:
    """Texts such as "cuda:0", and attributes such as torch.cuda or x.is_cpu."""
    n = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            n += node.value.partition(":")[0] in ("cpu", "cuda", "xpu", "mps", "npu", "hpu")
        elif isinstance(node, ast.Attribute):
            n += node.attr in ("cuda", "cpu", "xpu", "mps", "is_cuda", "is_cpu", "is_mps", "is_xpu")
    return n


def test_devices_are_named_where_they_must_be() -> None:
    """A kind of device that is named elsewhere is a device that was forgotten."""
    found = {}
    for path in sorted((ROOT / "inference").rglob("*.py")):
        name = path.relative_to(ROOT / "inference").as_posix()
        if not name.startswith("ops/gpu/") and (n := names_of_devices(path.read_text())):
            found[name] = n
    assert not {name: n for name, n in found.items() if n > NAMED.get(name, 0)}
    assert not NAMED.keys() - found.keys()


# ---------------------------------------------------------------- what is asked for, and what is here


@pytest.mark.parametrize(
    "name, text",
    [
        ("tpu", "--device tpu: torch knows no such device; this torch ({version}) has cpu"),
        ("xpu", "--device xpu: there is none that torch can use; this torch ({version}) has cpu"),
        ("mps", "--device mps: there is none that torch can use; this torch ({version}) has cpu"),
        ("npu", "--device npu: torch knows no such device, and torch_npu cannot be imported (No module named 'torch_npu'); this torch ({version}) has cpu"),
        ("cpu:1", "--device cpu:1: there is 1, counted from 0"),
        ("meta", "--device meta: its tensors hold no numbers; plan.py says what a run would take"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_here(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, with what there is."""
    monkeypatch.setattr(devices, "available", lambda: ["cpu"])
    with pytest.raises(UserError) as caught:
        startup.choose_device(name, 0, 1)
    assert str(caught.value) == text.format(version=torch.__version__)


def test_what_is_here_is_listed() -> None:
    assert devices.available() == ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_a_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert startup.choose_device("cuda:1", 0, 1) == torch.device("cuda:1") and chosen == [1]
    with pytest.raises(UserError, match=r"^--device cuda:2: there are 2, counted from 0$"):
        startup.choose_device("cuda:2", 0, 1)
    with pytest.raises(UserError, match=r"^--device cuda:1 is one device, and there are 2 ranks: --device cuda$"):
        startup.choose_device("cuda:1", 0, 2)


def test_a_mistyped_device_is_answered_without_torch() -> None:
    code = "import sys, generate\ntry: generate.parse(['--ckpt-path', 'x', '--interactive', '--device', 'GPU 0'])\nexcept Exception as e: print(e)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(PYTHONPATH=str(ROOT / "inference")), capture_output=True, text=True)
    assert done.stdout.splitlines() == ["argument --device: 'GPU 0' is not like cpu, cuda or cuda:1 (--help lists the flags)", "False"]


def test_the_reference_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices, on GPUs that no table serves, and on GPUs without Triton; each says why."""
    gpu, half = torch.device("cuda", 0), Numerics()
    assert type(backend.choose_backend(torch.device("xpu"), half)) is ReferenceBackend
    assert backend.why_reference(torch.device("xpu")) == "there are no kernels for xpu"
    assert not backend.why_reference(devices.CPU) and not backend.why_reference(gpu)

    def architecture(device: torch.device) -> str:
        raise UserError("Tesla T4 (sm_75) is none of the GPUs served")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(backend, "architecture", architecture)
    assert backend.why_reference(gpu) == "Tesla T4 (sm_75) is none of the GPUs served"
    assert type(backend.choose_backend(gpu, half)) is ReferenceBackend and not backend.has_fp8(gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.why_reference(gpu) == "Triton is not installed"


def test_numerics_where_types_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 weights are widened where nothing multiplies them; what torch cannot hold there is refused or widened."""
    args, xpu = replace(parse(V3), dtype="fp8"), torch.device("xpu", 0)
    monkeypatch.setattr(devices, "holds", lambda device, dtype: True)
    assert choose_numerics(args, xpu, "auto", "auto") == (Numerics(), "numerics: bfloat16, FP8 weights dequantised once at load, on xpu")
    numerics, says = choose_numerics(args, xpu, "auto", "bf16")
    assert numerics.gemm == "bf16" and "computed by the reference (slow, for comparison), on xpu" in says
    assert choose_numerics(args, xpu, "auto", "fp8")[0].gemm == "fp8"
    monkeypatch.setattr(devices, "holds", lambda device, dtype: dtype == torch.float32)
    with pytest.raises(UserError, match=r"^--gemm fp8 and --dtype float32|^--gemm fp8: xpu has no FP8 in torch"):
        choose_numerics(args, xpu, "auto", "fp8")
    with pytest.raises(UserError, match=r"^--dtype bfloat16: xpu has no such type in torch; --dtype float32 has$"):
        choose_numerics(args, xpu, "bfloat16", "auto")
    numerics, says = choose_numerics(args, xpu, "auto", "auto")
    assert numerics == Numerics(torch.float32) and says.endswith("on xpu, which has no bfloat16")


def test_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its module says, on a Mac as Metal recommends; a device that does not say needs a cache of a given size."""
    xpu, mps = torch.device("xpu", 0), torch.device("mps", 0)
    monkeypatch.setattr("torch.xpu.mem_get_info", lambda device: (3 << 30, 4 << 30))
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 8 << 30)
    monkeypatch.setattr("torch.mps.driver_allocated_memory", lambda: 1 << 30)
    assert (setup.free_memory(xpu), setup.free_memory(mps)) == (3 << 30, 7 << 30)
    monkeypatch.setattr("torch.xpu.mem_get_info", lambda device: 1 / 0)
    assert setup.free_memory(xpu) is None
    rank = setup._rank_on(xpu, parse(V3), Numerics(), 1, False, 1)
    assert rank.reference and not rank.gpu and not rank.compiled
    on_gpu = replace(rank, gpu=True, reference=False)
    assert rank_memory.weight_bytes(rank) == rank_memory.weight_bytes(on_gpu)  # as they are loaded
    with pytest.raises(UserError, match=r"^xpu does not say how much memory is free: give --kv-cache-gib$"):
        setup.check_start(rank, xpu, RunConfig())
    setup.check_start(rank, xpu, RunConfig(kv_cache_gib=1))


def test_collectives_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that torch has for it; where it has only gloo's, or none, by way of the host."""
    monkeypatch.setattr("torch.distributed.is_backend_available", lambda name: True)
    found = {kind: startup.collectives_of(torch.device(kind)) for kind in ("cuda", "xpu", "mps", "hpu")}
    assert found == {"cuda": "nccl", "xpu": "xccl", "mps": None, "hpu": None}
    monkeypatch.setattr("torch.distributed.is_backend_available", lambda name: False)
    assert startup.collectives_of(torch.device("cuda")) is None
    assert startup.on(torch.device("mps"), Group(0, 2)).through_host
    assert startup.on(torch.device("cpu"), group := Group(0, 2)) is group


def test_only_gpus_copy_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they copy lies in pinned memory: from any other they have the host wait."""
    copies: list[tuple[Any, ...]] = []

    class Numbers:
        pinned = False

        def pin_memory(self) -> "Numbers":
            self.pinned = True
            return self

        def to(self, device: str, non_blocking: bool) -> None:
            copies.append((device, non_blocking, self.pinned))

    monkeypatch.setattr(torch, "as_tensor", lambda values, dtype: Numbers())
    for kind in ("cuda", "mps", "xpu", "cpu"):
        devices.upload([1], torch.int64, kind)
    assert copies == [("cuda", True, True), ("mps", False, False), ("xpu", False, False), ("cpu", False, False)]


# ---------------------------------------------------------------- a whole run


PROMPTS = [[5, 9, 200, 31, 7], list(range(2, 70))]


def start(checkpoint: Path, ways: list[dict[str, Any]], **ranks: Any) -> subprocess.Popen[str]:
    variables = environment(PYTHONPATH=os.pathsep.join(map(str, (ROOT / "inference", ROOT / "tests"))), **ranks)
    ways = [{"max_model_len": 128, "mtp": 1} | way for way in ways]
    command = [sys.executable, "-m", "support.run_on_standin", str(checkpoint), json.dumps({"prompts": PROMPTS, "ways": ways})]
    return subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def results(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()], err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def answers(tiny: Path, dtype: torch.dtype) -> list[list[int]]:
    """What the reference answers on a CPU."""
    engine = Engine(ours(tiny, Numerics(dtype), backend=ReferenceBackend()), None, RunConfig(max_model_len=128, mtp=1))
    params = SamplingParams(temperature=0.8, seed=7, max_new_tokens=5, logprobs=2)
    return [request.tokens for request in engine.generate(PROMPTS, params)]


def test_a_run_on_a_device_that_there_are_no_kernels_for(tiny: Path) -> None:
    """Prompts, drafts and sampling: to the bit the reference's answers on a CPU, and every tensor is on the device. One
    that lacks float64 and FP8, as MPS does, has its weights widened and its tokens drawn on the host; one without
    bfloat16 computes in float32."""
    ways = [{}, {"lacks": ["float64", "float8_e4m3fn"]}, {"lacks": ["bfloat16"]}, {"memory": []}]
    found, err = results(start(tiny, ways))
    *ran, refused = found
    expected = [answers(tiny, dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert [one["answers"] for one in ran] == [expected[0], expected[0], expected[1]]
    assert [one["dtype"] for one in ran] == ["torch.bfloat16", "torch.bfloat16", "torch.float32"]
    assert all(one["devices"] == ["standin:0"] and one["backend"] == "ReferenceBackend" for one in ran)
    assert ran[0]["ops"] > 50
    assert refused == {"error": "standin does not say how much memory is free: give --kv-cache-gib"}
    assert err.count("note: the reference computes, in plain torch (there are no kernels for standin)") == 4
    assert "numerics: bfloat16, FP8 weights dequantised once at load, on standin\n" in err
    assert "numerics: float32 throughout, FP8 weights dequantised exactly, on standin, which has no bfloat16\n" in err


@pytest.mark.trust
def test_two_ranks_on_other_devices(tiny: Path) -> None:
    """By the collectives that torch has for the device, and by way of the host, in one lane and in two: the answers of
    one rank."""
    ways = [{"dtype": "float32", "dp": lanes, "no_collectives": without} for without in (False, True) for lanes in (1, 2)]
    port = free_port()
    found = [results(one)[0] for one in [start(tiny, ways, **rank_environment(rank, 2, port)) for rank in (0, 1)]]
    expected = answers(tiny, torch.float32)
    assert [one["answers"] for one in found[0]] == [expected] * 4
    assert [[one["through_host"] for one in rank] for rank in found] == [[False, False, True, True]] * 2


SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 3}


def test_a_decode_step_waits_for_its_tokens_alone(tiny: Path) -> None:
    """Greedy, or with temperature and top-p, of recorded steps: the host waits once for what the model said, and with
    drafts once more for each. Penalties and log-probabilities are the control: they ask for more."""
    control = {"mtp": 0}, {"temperature": 0, "logprobs": 2, "repetition_penalty": 1.2}
    ways = [({"mtp": 0}, {"temperature": 0}), ({"mtp": 0}, SAMPLED), ({"mtp": 2}, SAMPLED)]
    variables = environment(PYTHONPATH=os.pathsep.join(map(str, (ROOT / "inference", ROOT / "tests"))))
    asked = json.dumps({"prompts": [[5, 9], [4, 5, 6]], "ways": [*ways, control]})
    command = [sys.executable, "-m", "support.waits_on_standin", str(tiny), asked]
    done = subprocess.run(command, env=variables, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    *found, asking = json.loads(done.stdout)
    for (run, _), steps in zip(ways, found, strict=True):
        assert len(steps) > 3
        assert all(set(waits) == {"tolist"} and len(waits) <= 1 + run["mtp"] for waits in steps), (run, steps)
    assert all(len(waits) > 1 for waits in asking)


# ---------------------------------------------------------------- other systems


def test_answers_where_there_is_no_unix(tiny: Path, tmp_path: Path) -> None:
    """No fcntl, no preadv, no /proc: a file of prompts is answered all the same, without our C."""
    (tmp_path / "prompts").write_text("hello\n")
    flags = ["--ckpt-path", tiny, "--input-file", tmp_path / "prompts", "--max-new-tokens", "2", "--raw"]
    variables = environment(PYTHONPATH=os.pathsep.join(map(str, (ROOT / "inference", ROOT / "tests"))))
    command = [sys.executable, "-m", "support.without_unix", *map(str, flags)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and "Completion: " in done.stdout, done.stderr
    assert "the C kernels need Linux on a little-endian processor, and GNU OpenMP in torch" in done.stderr


def test_what_takes_a_unix_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, where a checkpoint is to be written and where a terminal is to be held."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(UserError, match=r"^writing a checkpoint takes a Unix system, which locks and syncs folders$"):
        AtomicWriter(tmp_path).__enter__()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UserError, match="--interactive takes a Unix terminal; --input-file does without"):
        generate.parse(["--ckpt-path", "x", "--interactive"])


def test_memory_of_a_host_that_is_no_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 4 << 20, "SC_PAGE_SIZE": 16384}.__getitem__)  # a Mac of 64 GiB
    assert host_memory.host_memory(tmp_path) == 48 << 30
    monkeypatch.delattr(os, "sysconf")
    assert host_memory.host_memory(tmp_path) == 4 << 30


def test_reading_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    view = memoryview(bytearray(30))
    monkeypatch.delattr(os, "preadv")
    with open(tmp_path / "file", "rb") as file:
        assert reading._read_at(file.fileno(), view, 60) == 30 and bytes(view) == bytes(range(60, 90))
        assert reading._read_at(file.fileno(), view, 95) == 5 and bytes(view[:5]) == bytes(range(95, 100))
