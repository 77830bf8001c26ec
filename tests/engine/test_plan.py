"""What a run is said to take, against published sizes, tensors that exist, and a process that runs."""

import itertools
import json
import math
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

pytest.importorskip("triton")
import plan
from checkpoint import weights
from core.batch import Batch
from core.config import ModelArgs, load_config, parse
from core.errors import UserError
from core.numerics import Numerics
from core.sampling_params import SamplingParams
from engine import engine as engines
from engine import memory
from engine.engine import Engine
from engine.memory import Limits, RankSpec
from engine.sampling import Ask, verify
from model import Transformer
from ops import backend as ops
from ops import reference
from ops.cpu import backend as cpu
from ops.cpu import kernels as kernel_cpu
from ops.gpu import attention as kernel_attention
from ops.gpu import fused as kernel_fused
from ops.gpu import gemm as kernel
from ops.gpu import moe as kernel_moe
from parallel.group import Group
from support.checkpoints import fp8_sizes, make_checkpoint
from support.families import FAMILIES
from support.processes import environment

INFERENCE = Path(plan.__file__).parent
V3 = load_config(INFERENCE / "configs" / "config_671B.json")
FP8 = Numerics(torch.bfloat16, "fp8")
TP8 = RankSpec(V3, replace(FP8, experts="split"), 8, mtp=True)
PUBLISHED = 688_574_839_360  # bytes of the tensors in the released checkpoint
LIMITS = Limits(32768, 32)


# ---------------------------------------------------------------- the released model


def test_the_table_has_the_published_sizes():
    whole = sum(math.prod(s.shape) * s.dtype.itemsize for s in weights.expected_tensors(V3, True).values())
    assert whole == PUBLISHED
    assert memory.parameters(TP8) == 671_026_419_200
    assert memory.parameters(replace(TP8, num=Numerics())) == 671_026_419_200


@pytest.mark.parametrize("experts", ["whole", "split"])
def test_all_ranks_together_hold_the_published_bytes(experts):
    h, q, latent, layers = 7168, 1536, 576, 62
    copies = 2 * 129280 * h * 2  # embedding and head of the MTP module
    low_rank = q * h + 12 * 56 * 4 + latent * h + 5 * 56 * 4  # q_a, kv_a with their scales
    norms = 2 * (layers * (2 * h + q + 512) + h + 3 * h)
    router = (layers - 3) * (256 * h * 2 + 256 * 4)
    everywhere = layers * low_rank + norms + router + h * 2 * h * 2  # and eh_proj: on each of the 8 ranks
    widened = layers * (32768 * 512 - 256 * 4 * 4)  # kv_b is bfloat16 in memory, and has no scales
    held = 8 * sum(memory.weight_bytes(replace(TP8, num=replace(FP8, experts=experts))).values())
    assert held == PUBLISHED - copies + widened + 7 * everywhere


def test_targets_for_decoding():
    """The table of the project's targets: one rank of TP8, without drafts."""
    table = {1: (8, 5.83), 8: (57, 21.6), 32: (163, 55.4), 128: (252, 83.6)}
    for sequences, (experts, gb) in table.items():
        read = memory.decode_reads(TP8, sequences, 4096)
        assert round(read.experts) == experts
        assert read.weights / 1e9 == pytest.approx(gb, rel=0.01)
        assert read.latents == sequences * 4096 * 61 * 576 * 2
    main = sum(n for (mtp, _), n in memory.weight_bytes(TP8).items() if not mtp)
    assert main / 1e9 == pytest.approx(85.1, rel=0.01)
    assert memory.latent_bytes(TP8, mtp=False) / 1e3 == pytest.approx(70.3, rel=0.01)


def test_drafts_read_more_experts_and_the_module():
    plain, drafts = (memory.decode_reads(TP8, 8, 4096, k) for k in (0, 1))
    module = sum(n for (mtp, part), n in memory.weight_bytes(TP8).items() if mtp and part != memory.ROUTED)
    assert drafts.weights - memory.decode_reads(TP8, 16, 4096).weights > module
    assert drafts.latents * 61 == plain.latents * 62
    assert memory.decode_reads(TP8, 8, 4096, 2).weights > drafts.weights


# ---------------------------------------------------------------- weights and latents that exist


def sizes_of(value: object) -> dict[int, int]:
    """Bytes of the tensors in a module's attribute, packed ones and lists of them too."""
    if isinstance(value, cpu.Packed):
        return sizes_of(value.data)
    if isinstance(value, list):
        return {key: n for each in value for key, n in sizes_of(each).items()}
    if isinstance(value, torch.Tensor):
        return {value.data_ptr(): value.numel() * value.element_size()}
    return {}


def held(model: Transformer) -> int:
    """Bytes of everything a model keeps but its rotary frequencies."""
    values = [*model.parameters(), *model.buffers(), *(v for m in model.modules() for v in vars(m).values())]
    return sum({key: n for value in values for key, n in sizes_of(value).items()}.values()) - model.inv_freq.nbytes


class NoKernel:
    """Stands for a Triton kernel: what it would compute is left out."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


SIDES = ("GPU", "CPU", "CPU, no compiler")
SPLIT = Numerics(experts="split")


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device whose forms of weights and ops a test meets: a CPU with compiled kernels or without, or a GPU, whose ops do all but launch their kernels: these allocate nothing, and no size depends on what they compute."""
    if request.param == "CPU" and kernel_cpu.library() is None:
        pytest.skip("there is no C compiler")
    if request.param == "CPU, no compiler":
        monkeypatch.setattr(kernel_cpu, "library", lambda: None)
    if request.param == "GPU":
        monkeypatch.setattr(ops, "_fast", lambda x: True)
        monkeypatch.setattr(cpu, "mla", reference.mla)  # float32's
        monkeypatch.setattr(ops, "prepare", lambda w: w)
        monkeypatch.setattr(ops, "prepare_float32", lambda w: w)
        for module in (kernel, kernel_attention, kernel_fused, kernel_moe):
            monkeypatch.setattr(module, "architecture", lambda device: "sm_90", raising=False)
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, NoKernel())
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("numerics", [Numerics(), Numerics(torch.float32), Numerics(fp8_latents=True), FP8, SPLIT])
def test_a_rank_holds_what_is_said(family, ranks, side, numerics):
    untied = parse(FAMILIES[family] | (fp8_sizes(2) if numerics.gemm else {}))
    for args in (untied, replace(untied, tie_word_embeddings=True)):
        model = Transformer(args, numerics, Group(ranks - 1, ranks))
        for parameter in model.parameters():
            parameter.data.zero_()
        model.prepare()
        rank = RankSpec(args, numerics, ranks, side == "GPU", args.n_mtp_layers > 0)
        assert sum(memory.weight_bytes(rank).values()) == held(model)
        assert memory.page_bytes(rank) == model.page_bytes


# ---------------------------------------------------------------- tensors of a step


class Peak(TorchDispatchMode):
    """Bytes of the tensors that ops have made and that still exist, and the most they came to."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self._meet((args, kwargs), new=False)
        out = op(*args, **(kwargs or {}))
        self._meet(out, new=True)
        return out

    def _meet(self, tensors, new):
        for t in tree_iter(tensors):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known[storage._cdata] = storage.nbytes() * new
                weakref.finalize(storage, self._gone, storage._cdata)
                self.live += storage.nbytes() * new
        self.peak = max(self.peak, self.live)

    def _gone(self, key):
        self.live -= self.known.pop(key)


class Alone(Group):
    """One rank of several, whose collectives make what they make, without the others."""

    def all_reduce(self, x):
        return x

    def all_gather(self, x):
        return x if self.size == 1 else torch.cat([torch.empty_like(x) for _ in range(self.size)], dim=-1)


SIZES = {
    "vocab_size": 512, "dim": 512, "inter_dim": 1024, "moe_inter_dim": 256, "n_layers": 2, "n_dense_layers": 1,
    "n_heads": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_activated_experts": 4, "q_lora_rank": 192,
    "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_mtp_layers": 1,
}  # fmt: skip
FLOAT32, PACKED = Numerics(torch.float32), Numerics(fp8_latents=True)
THIN = {"n_heads": 128, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
ROUTED = {"n_heads": 1, "inter_dim": 512, "moe_inter_dim": 2048, "n_shared_experts": 0}
STEPS = {  # what differs from SIZES; numerics, sequences, new tokens of each, context, drafts, ranks
    "attention expanded": ({}, Numerics(), 1, 512, 512, 0, 1),
    "over several tiles": ({}, Numerics(), 1, 512, 2048, 1, 1),
    "in float32": ({}, FLOAT32, 1, 512, 2048, 0, 1),
    "absorbed": ({}, Numerics(), 1, 85, 2048, 0, 1),
    "many heads": (THIN, Numerics(), 1, 300, 1024, 0, 1),
    "heads over ranks": ({"n_heads": 32}, Numerics(), 1, 512, 1024, 0, 4),
    "dense MLP": ({"n_heads": 1, "inter_dim": 8192}, Numerics(), 1, 512, 512, 0, 1),
    "experts": (ROUTED, Numerics(), 1, 512, 512, 0, 1),
    "experts' sum": ({"n_heads": 1, "inter_dim": 64, "dim": 2048}, Numerics(), 1, 512, 512, 0, 1),
    "logits": ({"vocab_size": 65536}, FLOAT32, 1, 256, 256, 0, 1),
    "logits over ranks": ({"vocab_size": 65536}, FLOAT32, 1, 256, 256, 0, 4),
    "several absorbed": ({}, Numerics(), 8, 31, 2048, 0, 1),
    "decoding": ({}, FLOAT32, 8, 1, 4096, 0, 1),
    "decoding FP8 latents": ({}, PACKED, 8, 1, 4096, 0, 1),
}


LONG = {"over several tiles", "in float32", "many heads", "heads over ranks", "dense MLP", "experts' sum", "logits"}


@pytest.mark.parametrize("step", [pytest.param(s, marks=pytest.mark.trust) if s in LONG else s for s in STEPS])
def test_a_step_takes_what_is_said(step, side):
    """Nowhere may more exist than said, and in the worst case of what the limits allow the two agree."""
    if (step, side) == ("several absorbed", "CPU, no compiler"):
        pytest.skip("there one sequence with all the rows takes far more")
    changes, numerics, sequences, new, context, drafts, ranks = STEPS[step]
    args = ModelArgs(**SIZES | changes)
    rank = RankSpec(args, numerics, ranks, side == "GPU", drafts > 0)
    fewer = (memory.DECODE_ROWS, memory.few_rows(args))
    counts = {new, *(n for n in fewer if n < new)}  # the worst may be the most rows that take the absorbed form
    peak = max(peak_of(rank, [(n, context)] * sequences, drafts) for n in counts)
    said = memory.step_bytes(rank, Limits(context, sequences, new * sequences, drafts), decode=new == 1)
    assert peak <= 1.03 * said <= 1.3 * peak


def peak_of(rank: RankSpec, sequences: list[tuple[int, int]], drafts: int) -> int:
    """The most that exists in a forward of sequences, each of (new tokens, length with them), in the MTP module, around
    logits of prompts and those that are sampled, and in the sampler."""
    gpu = rank.gpu and rank.num.dtype == torch.bfloat16  # with float32 the reference attends, which looks at tensors
    device = "meta" if gpu else "cpu"
    model = Transformer(rank.args, rank.num, Alone(0, rank.ranks), device, mtp=rank.mtp)
    for parameter in model.parameters():
        if parameter.dtype != torch.float8_e4m3fn:
            parameter.data.normal_(std=0.02)
    model.prepare()
    ends = list(itertools.accumulate(-(-length // 64) for _, length in sequences))
    pages = torch.randperm(ends[-1], generator=torch.Generator().manual_seed(0)).tolist()
    cache = model.new_cache(len(pages))
    with Peak() as measured:
        held = [pages[start:end] for start, end in itertools.pairwise([0, *ends])]
        places = [([1] * new, length - new, own) for (new, length), own in zip(sequences, held, strict=True)]
        batch = Batch.pack(places, device)
        hidden = model(batch, cache)
        if drafts:
            model.draft(batch, hidden[list(range(len(hidden)))], cache)
        model.logits(hidden[: memory.SCORED_ROWS])
        if device == "cpu":
            logits = model.logits(hidden[: len(sequences)])
            asks = [Ask(SamplingParams(temperature=1.0, top_p=0.9), i, [1, 2], 1) for i in range(len(sequences))]
            verify(logits, asks)
    return measured.peak


ABOVE = 1.06  # the shared experts run beside the routed ones, but here before them
BATCHES = {  # sequences' new tokens and lengths, drafts, and how far above them the limits' worst may be
    "prefill": ([(2048, 32768)], 0, ABOVE),
    "in two slabs": ([(2048, 163840)], 1, ABOVE),
    "of many": ([(8192, 8192)], 0, ABOVE),
    "of several": ([(66, 32768)] * 31, 0, ABOVE),
    "decoding": ([(1, 32768), *[(1, 64)] * 31], 0, 1.6),  # splits are whole pages
}


@pytest.mark.parametrize("side", ["GPU"], indirect=True)
@pytest.mark.parametrize("step", BATCHES)
@pytest.mark.parametrize("numerics", [FP8, replace(FP8, fp8_latents=True), replace(FP8, gemm="bf16")])
@pytest.mark.parametrize(
    ("ranks", "experts"),
    [(8, "split"), *(pytest.param(*more, marks=pytest.mark.trust) for more in ((8, "whole"), (16, "split")))],
)
def test_a_step_of_deepseek_v3_takes_what_is_said(step, numerics, ranks, experts, side, monkeypatch):
    """The same at its real size, on tensors without memory."""
    sequences, drafts, above = BATCHES[step]
    rank = RankSpec(replace(V3, n_layers=4), replace(numerics, experts=experts), ranks, mtp=True)
    limits = Limits(max(n for _, n in sequences), len(sequences), sum(n for n, _ in sequences), drafts)
    monkeypatch.setattr(memory, "SAMPLER_BYTES", 0)  # it looks at its tensors, which have no memory here
    peak, said = peak_of(rank, sequences, drafts), memory.step_bytes(rank, limits, decode=sequences[0][0] == 1)
    assert 0.99 * peak <= said <= above * peak


def test_constants_are_the_kernels():
    for name in ("SPLIT_BYTES", "SLAB_BYTES", "PROGRAMS"):
        assert getattr(memory, name) == getattr(kernel_attention, name)
    assert max(tile.rows for tiles in kernel_attention.DECODE.values() for tile in tiles) == memory.DECODE_TILE_ROWS


def test_graphs_keep_a_step_and_a_page(side):
    """What an engine that records takes before it answers: the cache's page, the hidden states, results, facts."""
    args = parse(FAMILIES["v3"])
    gpu = side == "GPU"
    rank, limits = RankSpec(args, Numerics(), gpu=gpu, mtp=True), Limits(512, 6, 64, 2)
    if not gpu:
        assert memory.need(rank, limits).graphs == 0 < memory.need(rank, replace(limits, graphs=True)).graphs
        return
    assert memory.need(rank, replace(limits, graphs=False)).graphs == 0
    assert memory.need(replace(rank, num=Numerics(torch.float32)), limits).graphs == 0  # attends as the reference does
    model = Transformer(args, Numerics())
    kept: list[torch.Tensor] = []

    def capture(run):
        kept.append(torch.empty(0))
        return run

    engine = Engine(model, None, max_model_len=512, max_num_seqs=6, max_num_batched_tokens=64, n_pages=9, mtp=2,
                    graphs=capture)  # fmt: skip
    facts = sum(t.nbytes for g in (engine._step_graphs, *engine._draft_graphs) for t in g._facts.values())
    rows = sum((1, 2, 3, 4, 6)) * (3 + 3 + 1)
    said = memory.need(rank, limits).graphs - memory.step_bytes(rank, limits, decode=True)
    assert len(kept) == 3 * 5 and engine.cache.shape[1] == 10
    assert said == model.page_bytes + engine._step_graphs.hidden.nbytes + rows * args.dim * 2 + facts


# ---------------------------------------------------------------- a process that runs


def test_a_process_grows_as_said(tmp_path):
    """Memory of a fresh process that loads 300 MB of weights, makes its cache and answers, within 10 % of the plan."""
    sizes = {
        "hidden_size": 1024, "vocab_size": 8192, "intermediate_size": 2048, "moe_intermediate_size": 512,
        "num_hidden_layers": 4, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
        "num_attention_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64,
    }  # fmt: skip
    make_checkpoint(tmp_path, FAMILIES["v3"] | sizes, shard_bytes=64 << 20)
    # what is freed goes back at once: this is about tensors, not about how an allocator keeps its gaps
    variables = environment(PYTHONPATH=str(INFERENCE), MALLOC_MMAP_THRESHOLD_="131072")
    script = Path(__file__).parents[1] / "support" / "memory_of_a_run.py"
    run = subprocess.run([sys.executable, script, tmp_path, "1024", "1024"], env=variables, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    found = json.loads(run.stdout)
    assert found["weights"] > 2.9e8
    assert found["loaded"] == pytest.approx(found["weights"], rel=0.1)
    assert found["loading"] == pytest.approx(found["weights"] + found["packing"], rel=0.1)
    assert found["cached"] == pytest.approx(found["weights"] + found["cache"], rel=0.1)
    assert found["running"] == pytest.approx(found["weights"] + found["cache"] + found["step"], rel=0.1)


# ---------------------------------------------------------------- refusals


def refusal(rank: RankSpec, limits: Limits, gb: float, **more) -> str:
    with pytest.raises(UserError) as e:
        memory.check_fits(rank, limits, int(gb * 1e9), **more)
    return str(e.value)


def test_what_cannot_fit_is_refused_with_what_would_help(monkeypatch):
    assert refusal(TP8, LIMITS, 80) == (
        "a rank needs 91.02 GB of memory and 80.00 GB are free (weights 86.93 GB, a step 1.48 GB, latents of 32768 tokens "
        "2.34 GB, kept free 0.26 GB); 16 ranks with as much memory each would do"
    )
    assert refusal(TP8, LIMITS, 90).endswith(
        "; 16 ranks with as much memory each or --kv-cache-dtype fp8 or --max-model-len 19968 would do"
    )
    assert "latents of one page" in refusal(TP8, LIMITS, 80, shrink=True)
    assert refusal(TP8, LIMITS, 141, cache=100 << 30).endswith("); --kv-cache-gib 48.9 would do")
    assert refusal(replace(TP8, ranks=16), LIMITS, 20).endswith("; more memory would do")
    on_cpu = RankSpec(V3, Numerics(), gpu=False, mtp=True)
    if kernel_cpu.library() is not None:
        assert "packing them 1.85 GB); 2 ranks with" in refusal(on_cpu, Limits(64), 1366)
    monkeypatch.setattr(kernel_cpu, "library", lambda: None)
    assert "packing them 3.71 GB); 2 ranks with" in refusal(on_cpu, Limits(64), 1366)


def test_what_is_proposed_fits_and_no_more_would():
    memory.check_fits(TP8, replace(LIMITS, max_model_len=19968), int(90e9))
    refusal(TP8, replace(LIMITS, max_model_len=19968 + 64), 90)
    memory.check_fits(replace(TP8, num=replace(FP8, fp8_latents=True)), LIMITS, int(90e9))
    memory.check_fits(TP8, LIMITS, int(141e9), cache=int(48.9 * 2**30))


def test_pages_leave_room_for_the_largest_step():
    free, small = 2 * 10**9, Limits(2048, 4, 512)
    for limits in (small, replace(small, max_num_batched_tokens=4096), replace(small, max_model_len=32768)):
        pages = memory.pages_that_fit(TP8, limits, free)
        wanted = memory.need(TP8, limits)
        step = wanted.step + wanted.graphs
        assert pages * memory.page_bytes(TP8) <= (free - step) * 0.9 < (pages + 1) * memory.page_bytes(TP8)
    assert memory.pages_that_fit(TP8, small, 10**8) == 0
    long = replace(small, max_model_len=163840)
    assert memory.pages_that_fit(TP8, long, free) < memory.pages_that_fit(TP8, long, free, shrink=True)
    on_cpu = replace(TP8, gpu=False)
    assert memory.pages_that_fit(on_cpu, small, free) < 0.6 * memory.pages_that_fit(TP8, small, free)


def test_the_engine_refuses_before_it_loads(tmp_path, monkeypatch):
    make_checkpoint(tmp_path, FAMILIES["v3"])
    monkeypatch.setattr(weights, "load_into", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(engines, "free_memory", lambda device: 5_000_000)
    with pytest.raises(UserError, match=r"a rank needs .* and 0\.01 GB are free .*would do$"):
        Engine.from_pretrained(tmp_path)


def test_the_engine_takes_the_pages_that_fit(monkeypatch):
    args = parse(FAMILIES["v3"])
    model = Transformer(args, Numerics()).prepare()
    rank, limits = engines.rank_of(model), Limits(2560, 8, 64)
    free = 2 * 100 * model.page_bytes + memory.step_bytes(rank, limits)
    monkeypatch.setattr(engines, "free_memory", lambda device: free)
    engine = Engine(model, None, max_model_len=2560, max_num_batched_tokens=64)
    assert engine.cache.shape[1] == 100
    with pytest.raises(UserError, match="memory holds"):
        Engine(model, None, max_model_len=2560, max_num_batched_tokens=512)
    assert Engine(model, None, max_num_batched_tokens=512).max_model_len < 2560


# ---------------------------------------------------------------- the command line


def command(capsys, *flags: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
        status = plan.main()
    return status, *capsys.readouterr()


CONFIG = INFERENCE / "configs" / "config_671B.json"


def test_json(capsys):
    status, out, err = command(
        capsys, "--config", CONFIG, "--tp", 8, "--max-model-len", 32768, "--max-num-seqs", 32, "--json"
    )
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["model"] == {"parameters": 671_026_419_200, "mtp_parameters": 11_610_068_224}
    assert found["run"] | {"numerics": ""} == {
        "ranks": 8, "device": "cuda", "numerics": "", "experts": "split", "max_model_len": 32768, "max_num_seqs": 32,
        "max_num_batched_tokens": 2048, "mtp": 0, "kv_cache_dtype": "auto",
    }  # fmt: skip
    rank = found["rank"]
    assert set(rank["weights"]) == {*memory.PARTS, memory.MTP}
    assert sum(rank["weights"].values()) == sum(memory.weight_bytes(TP8).values())
    assert rank["latents"] == {"of_a_token": 71424, "pages": 32 * 512, "bytes": 32 * 32768 * 71424}
    total = sum(rank["weights"].values()) + rank["latents"]["bytes"] + rank["activations"] + rank["graphs"]
    assert rank["total"] == total
    assert [fit["memory"] for fit in found["fits"].values()] == [80e9, 96e9, 141e9, 192e9]
    assert [fit["weights_fit"] for fit in found["fits"].values()] == [False, True, True, True]
    for fit in found["fits"].values():
        assert fit["sequences"] == fit["tokens"] // 32768
        assert (fit["tokens"] * 71424 + sum(rank["weights"].values()) <= fit["memory"]) or not fit["tokens"]
    works = [other["ranks"] for other in found["ranks"] if "problem" not in other]
    assert works == [1, 2, 4, 8, 16]
    why = {other["ranks"]: other.get("problem") for other in found["ranks"]}
    assert why[3] == "n_heads 128 does not divide by 3 ranks"
    assert why[32] == "ffn.w1 has 18432 rows, which 32 ranks cannot share in whole 128-wide FP8 blocks"
    step = found["decode"][0]
    assert step["seconds"] == {tb: (step["weights"] + step["latents"]) / (float(tb) * 1e12) for tb in ("3.35", "4.8")}


@pytest.mark.parametrize("experts", ["whole", "split"])
def test_experts_as_asked(capsys, experts):
    config = CONFIG.with_name("config_moonlight.json")
    _, out, _ = command(capsys, "--config", config, "--tp", 1, "--experts", experts, "--json")
    others = {other["ranks"]: other for other in json.loads(out)["ranks"]}
    assert {o["experts"] for o in others.values() if "experts" in o} == {experts}
    assert others[2]["weights"] < 0.51 * others[1]["weights"]


def test_text(capsys):
    status, out, _ = command(
        capsys, "--config", CONFIG, "--tp", 16, "--mtp", 1, "--kv-cache-dtype", "fp8", "--bandwidth", 4
    )
    assert status == 0
    assert "16 ranks, experts split on their inner width" in out
    assert "latents of 8 x 163,840 tokens, 40,672 bytes each" in out
    assert "not 32, 64: ffn.w1 has 18432 rows" in out
    assert "a step verifies 1 drafted" in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_checkpoint_on_a_cpu(capsys, tmp_path):
    make_checkpoint(tmp_path, FAMILIES["v3"] | fp8_sizes(2), fp8=True)
    status, out, err = command(capsys, "--ckpt-path", tmp_path, "--tp", 2, "--device", "cpu", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found["fits"]) == ["free here"]
    assert found["rank"]["graphs"] == 0 < found["rank"]["packing"]
    rank = RankSpec(load_config(tmp_path / "config.json"), Numerics(), 2, gpu=False, mtp=True)
    assert sum(found["rank"]["weights"].values()) == sum(memory.weight_bytes(rank).values())
    (tmp_path / "model-00001-of-00002.safetensors").unlink(missing_ok=True)
    next(tmp_path.glob("*.safetensors")).unlink()
    status, out, err = command(capsys, "--ckpt-path", tmp_path, "--tp", 2)
    assert (status, out) == (2, "") and ".safetensors: missing" in err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), "give --config or --ckpt-path"),
        (("--config", "nowhere.json"), "nowhere.json: no such file"),
        (("--config", CONFIG, "--tp", 0), "argument --tp: 0 is not at least 1"),
        (("--config", CONFIG, "--tp", 3), "n_heads 128 does not divide by 3 ranks (it works with 1, 2, 4, 8, 16)"),
        (("--config", CONFIG, "--tp", 16, "--max-model-len", 200000), "expected from 2 to this model's 163840"),
        (("--config", CONFIG, "--mtp", 5), "argument --mtp: invalid choice: 5"),
        (("--config", CONFIG.with_name("config_16B.json"), "--mtp", 1), "--mtp needs an MTP module"),
        (("--config", CONFIG.with_name("config_16B.json"), "--gemm", "fp8"), "--gemm fp8 needs FP8 weights"),
        (("--config", CONFIG.with_name("config_16B.json"), "--tp", 16, "--experts", "split", "--gemm", "auto"), None),
        (("--config", CONFIG, "--bandwidth", 0), "0 is not a positive number of TB/s"),
        (("--ckpt-path", "nowhere"), "nowhere: no such directory"),
        (("--config", CONFIG, "--tokens", 3), "unrecognized arguments"),
    ],
)
def test_wrong_use(capsys, flags, text):
    status, out, err = command(capsys, *flags)
    if text is None:
        assert status == 0
        return
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and text in err and err.count("\n") == 1


def test_wrong_use_is_answered_without_torch():
    code = "import sys, plan; sys.argv[1:] = ['--tp']; assert plan.main() == 2; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(PYTHONPATH=str(INFERENCE)), check=True)


def test_readme_shows_what_plan_says(capsys, monkeypatch):
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text()
    [command] = re.findall(r"^python plan\.py (.*)$", readme, re.MULTILINE)
    monkeypatch.chdir(root / "inference")
    monkeypatch.setattr(sys, "argv", ["plan.py", *command.split()])
    assert plan.main() == 0
    assert capsys.readouterr().out in readme
