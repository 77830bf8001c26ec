"""The benchmarks run to their end without a GPU (and then say that they measured nothing), refuse what cannot run,
report what is wrong, and the documents hold the committed figures."""

import itertools
import json
import math
import runpy
import shlex
import statistics
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from lib import forms, llama_side, peers, race, report, timing
from lib.forms import Engine
from lib.llama_side import Case as ForwardCase
from lib.peers import Peer
from lib.race import Case, Contestant
from lib.timing import NoClock, Refused

import bench
import convert_memory
import format_masks
import kernel_cpu
import kernel_gpu
import lane_throughput
import model_gpu
import online_serving
import rank_step
import scale_out
import tables
from core.config import load_config
from ops.cpu import kernels
from support.checkpoints import make_checkpoint

FIGURE = Path(__file__).parents[2] / "figures" / "server_load.py"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a benchmark's main; its saved results, what it printed, and its exit code."""

    def call(module: Any, *arguments: str) -> tuple[Any, str, int]:
        path = tmp_path / "out.json"
        monkeypatch.setattr("sys.argv", ["bench", *arguments, "--output", str(path)])
        code = module.main()
        return json.loads(path.read_text())["results"] if path.exists() else None, capsys.readouterr().out, code

    return call


def test_commands_are_those_of_any_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of this project is given as from its root; no record has another machine's."""
    made, out = tmp_path / "made.json", str(tables.ROOT / "out.json")
    monkeypatch.chdir(tables.ROOT)
    monkeypatch.setattr("sys.argv", [str(tables.ROOT / "benchmarks/bench.py"), "--turns", "2", "--output", out])
    report.save(str(made), {})
    assert json.loads(made.read_text())["command"] == "python benchmarks/bench.py --turns 2 --output out.json"
    for path in sorted((tables.ROOT / "benchmarks/results").glob("*.json")):
        words = shlex.split(json.loads(path.read_text())["command"])
        assert not [word for word in words if word.startswith("/")], path.name


def test_every_kernel_bench_runs_without_a_gpu(run: Any, tmp_path: Path) -> None:
    results, printed, code = run(kernel_gpu, "--smoke", "--v3", str(tmp_path))
    assert code == 0 and "The V3 repository is not at" in printed
    assert results["no_timing"] == timing.NO_TIMING and timing.NO_TIMING in printed
    assert json.loads(printed.splitlines()[-1])["no_timing"]
    rows = results["rows"]
    assert {row["bench"] for row in rows} == set(kernel_gpu.BENCHES)
    assert not any(row.get("wrong") for row in rows)
    assert all(row["no_timing"] for row in rows if "us" in row)
    ours = {"fp8_gemm", "w8a16_gemm", "w8a16_gemm INT8", "w4a16_gemm", "experts", "experts W8A16", "experts W4A16"}
    ours |= {"fused", "router", "sample", "mla", "mla, FP8 latents", "torch"}
    refused = {(row["bench"], row["contestant"]) for row in rows if "refused" in row and row["contestant"] in ours}
    assert not refused
    assert all(row["refused"] == "needs a GPU" for row in rows if row["contestant"] not in {*ours, "torch bf16"})


def test_a_rank_slice_runs_without_a_gpu(run: Any, tmp_path: Path) -> None:
    results, printed, code = run(rank_step, "--smoke", "--v3", str(tmp_path))
    assert code == 0 and results["no_timing"] and timing.NO_TIMING in printed
    assert results["memory"]["planned_weights_bytes"] > 0
    decode, drafting, prefill = results["rows"]
    assert [row["what"] for row in results["rows"]] == ["decode", "decode + MTP", "prefill"]
    for row in results["rows"]:
        assert "refused" not in row and row["eager"]["no_timing"] and row["read_bytes"] > 0 and row["limit_ms"] > 0
        assert 1 <= row["experts_touched"] <= 16
    assert decode["graph"] == drafting["graph"] == {"refused": "needs a GPU"} and "graph" not in prefill
    args = load_config(rank_step.CONFIGS / "config_demo.json")
    should = rank_step.messages(args, 2, tokens=2, sampled=2)
    layers = results["layers"]
    assert decode["collectives"]["all_reduces"] == 1 + 2 * layers and decode["collectives"]["all_gathers"] == 1
    assert decode["collectives"]["bytes"] == (1 + 2 * layers) * should[0].nbytes + should[-1].nbytes
    assert drafting["collectives"]["all_reduces"] == 1 + 2 * layers + 1 + 2  # the draft's embedding and layer
    [kernels] = results["kernels"].values()
    assert any("mm" in k["kernel"] for k in kernels) and not any("ms" in k for k in kernels)


def slice_options(**changes: Any) -> Namespace:
    options = dict(ranks=8, experts="split", gemm="fp8", kv_cache_dtype="auto", links="{}", bandwidth=4800.0,
                   batches=[1, 8, 32, 128], contexts=[4096])  # fmt: skip
    return Namespace(**options | changes)


def test_the_limit_of_a_rank_of_deepseek_v3() -> None:
    """GB that one of eight ranks reads, from its shapes: 38.7 MB of attention a layer, 5.5 MB an expert and so on."""
    args = load_config(rank_step.CONFIGS / "config_671B.json")
    model = rank_step.build(args, slice_options(), "meta").prepare()
    weights = rank_step.weights_of(model)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - model.inv_freq.nbytes
    assert rank_step.planned(args, slice_options()) == {"planned_weights_bytes": held}

    def gb(b: int, drafts: int = 0) -> float:
        return rank_step.decode_bytes(model, weights, b, 0, drafts) / 1e9

    for b, expected in ((1, 5.83), (8, 21.6), (32, 55.4), (128, 83.6)):
        experts = 256 * (1 - (31 / 32) ** b)
        counted = (61 * 38.7 + 3 * 49.5 + 58 * (5.5 + 3.7 + 5.505 * experts) + 232) / 1e3
        assert gb(b) == pytest.approx(expected, rel=2e-3) and gb(b) == pytest.approx(counted, rel=2e-3)
    for b, ratio in ((1, 1.48), (8, 1.69), (32, 1.36), (128, 1.04)):  # plus the head, read for the draft once more
        assert (gb(b, drafts=1) - weights.head / 1e9) / gb(b) == pytest.approx(ratio, abs=1e-2)
    latents = rank_step.decode_bytes(model, weights, 8, 4096) / 1e9 - gb(8)
    assert latents == pytest.approx(8 * 4096 * 70.3e3 / 1e9, rel=1e-3)
    linears, attention = rank_step.prefill_flops(model, weights, 2000)
    everywhere = 61 * 2112 * 7168 + 58 * 256 * 7168  # latents' projections and routers, which every rank computes
    assert linears * 8 / 2000 == pytest.approx(71.4e9 + 2 * 7 * everywhere, rel=2e-3)  # all ranks, a token
    assert attention * 8 / 2000 == pytest.approx(5.0e9, rel=0.02)  # with 1k of mean context
    rows = rank_step.limits(args, slice_options())["rows"]
    assert [row["sums"] for row in rows] == [123] * 4
    assert rows[0]["sent_bytes"] == 123 * 7168 * 2 + 129280 // 8 * 4


def test_the_work_of_each_kernel_of_deepseek_v3() -> None:
    """One of eight ranks: together what a step must read, and by kernel from its shapes."""
    args = load_config(rank_step.CONFIGS / "config_671B.json")
    model = rank_step.build(args, slice_options(), "meta").prepare()
    weights = rank_step.weights_of(model)

    def work(b: int, new: int, context: int, drafts: int = 0) -> dict[str, rank_step.Work]:
        touched = 256 * rank_step.chosen(args, b * new)
        return rank_step.work(model, b, new, context, drafts, touched, "sm_90")

    reads = {"gemm_kernel", "grouped_gemm_kernel", "decode_kernel", "router_kernel"}
    for b in (1, 32):
        found = work(b, 1, 4096)
        assert set(found) == {*reads, "norm_kernel", "norm_latents_kernel", "silu_mul_kernel", "combine_kernel"}
        absorbed = 61 * 2 * 16 * 128 * 512 * 2  # W^UK and W^UV, which a library multiplies
        total = rank_step.decode_bytes(model, weights, b, 4096) - weights.head - absorbed
        assert sum(found[name].nbytes for name in reads) == pytest.approx(total, rel=0.02)
        assert found["decode_kernel"].nbytes == pytest.approx(b * 61 * 4097 * 1152, rel=0.02)
        assert found["decode_kernel"].flops == b * 61 * 16 * 2 * (576 + 512) * 4097
    assert work(1, 1, 0)["router_kernel"] == (58 * (256 * 7168 * 2 + 7168 * 2), 58 * 2 * 256 * 7168)
    assert work(1, 1, 0)["combine_kernel"] == (58 * (8 + 2) * 7168 * 2, 0)
    assert work(2, 2, 0, drafts=1)["router_kernel"].flops == 59 * 4 * 2 * 256 * 7168
    found = work(1, 2000, 0)
    linears, attention = rank_step.prefill_flops(model, weights, 2000)
    products = ("gemm_kernel", "gemm_persistent_kernel", "grouped_gemm_kernel", "router_kernel")
    outside = 2 * 2000 * 61 * 2 * 16 * 128 * 512  # the absorbed products again
    assert sum(found[name].flops for name in products if name in found) == pytest.approx(linears - outside, rel=1e-3)
    assert found["prefill_kernel"].flops == attention and "decode_kernel" not in found


def test_a_breakdown_says_what_each_kernel_reached() -> None:
    kernels = [{"kernel": "a", "launches": 1.0, "ms": 2.0, "share": 0.5}, {"kernel": "b", "launches": 1.0, "ms": 1.0, "share": 0.25},
               {"kernel": "c", "launches": 1.0, "ms": 1.0, "share": 0.25}]  # fmt: skip
    done = {"a": rank_step.Work(4e9, 6e12), "b": rank_step.Work(3e9, 0.0)}
    rows = rank_step.rates(kernels, done)
    assert rows[0]["gb_per_s"] == pytest.approx(2000) and rows[0]["tflops"] == pytest.approx(3000)
    assert rows[1]["gb_per_s"] == pytest.approx(3000) and "tflops" not in rows[1] and rows[2] == kernels[2]
    text = rank_step.breakdowns({"kernels": {"step": rows}})
    assert "| 2000 | 3000 |" in " ".join(text.split()) and "| 3000 | – |" in " ".join(text.split())


def test_links_take_as_long_as_they_must() -> None:
    links = rank_step.Links(inside=1e9, between=1e8, inside_start=0.0, between_start=0.0)
    reduce, gather = rank_step.Message("all_reduce", 8000), rank_step.Message("all_gather", 8000)
    assert links.seconds(reduce, 8) == pytest.approx(2 * 7 * 1000 / 1e9)
    assert links.seconds(gather, 8) == pytest.approx(7 * 8000 / 1e9)
    assert links.seconds(reduce, 16) == pytest.approx(2 * 7 * 1000 / 1e9 + 1000 / 1e8)  # 2 x half of an eighth
    assert links.seconds(gather, 16) == pytest.approx(7 * 8000 / 1e9 + 8000 / 1e8)


@pytest.mark.parametrize("name", ["v2-lite", "moonlight"])
def test_a_whole_model_runs_without_a_gpu(name: str, run: Any) -> None:
    results, printed, code = run(model_gpu, name, "--smoke")
    assert code == 0 and results["no_timing"] and timing.NO_TIMING in printed
    assert [row["sequences"] for row in results["rows"]] == [1, 2]
    for row in results["rows"]:
        assert row["no_timing"] and row["same_first_token"] >= 1  # in bfloat16, where a tie may go either way


def contestant(name: str, y: torch.Tensor, **kind: Any) -> Contestant:
    return Contestant(name, lambda: lambda _: y, torch.ones(3, dtype=torch.float64), 10.0, 20.0, **kind)


def test_one_contestant_does_not_stop_the_others() -> None:
    def raises() -> Any:
        raise RuntimeError("\n\n  no such kernel \n on this machine")

    calls = []

    def later() -> Any:
        def call(i: int) -> torch.Tensor:
            calls.append(i)
            if len(calls) > 1:
                raise ValueError("only once")
            return torch.ones(3)

        return call

    ones = torch.ones(3)
    case = Case({"m": 1}, 2, [
        contestant("right", ones), contestant("near", ones * 1.004), contestant("far", ones * 1.006),
        contestant("nan", ones * math.nan), contestant("raises", ones)._replace(build=raises),
        contestant("later", ones)._replace(build=later), contestant("gpu", ones, gpu=True),
        contestant("elsewhere", ones)._replace(build={"what": "dense"}),
    ])  # fmt: skip
    rows = {row["contestant"]: row for row in race.race(case, NoClock())}
    assert list(rows) == ["right", "near", "far", "nan", "raises", "later", "gpu"]  # a peer that is not there has no row
    assert [name for name, row in rows.items() if "us" in row] == ["right", "near"]
    assert [name for name, row in rows.items() if row.get("wrong")] == ["far", "nan"]
    assert rows["raises"]["refused"] == "no such kernel" and rows["later"]["refused"] == "only once"
    assert rows["gpu"]["refused"] == "needs a GPU"
    assert [row["contestant"] for row in race.race(case, NoClock(), only=["near"])] == ["near"]


def test_a_lost_device_ends_the_run(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ops.gpu import gemm as kernel

    right, calls = kernel.fp8_gemm, []

    def fails_later(*args: Any) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) > 4:  # in the second case
            raise RuntimeError("an illegal memory access")
        return right(*args)

    monkeypatch.setattr(kernel, "fp8_gemm", fails_later)
    monkeypatch.setattr(race, "lost", lambda device: True)
    results, _, code = run(kernel_gpu, "dense", "--smoke", "--v3", str(tmp_path), "--only", "fp8_gemm")
    assert code == 3
    first, second = results["rows"]  # what there was is saved
    assert "us" in first and second["refused"] == "an illegal memory access"


def test_a_wrong_kernel_fails_the_bench(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ops.gpu import gemm as kernel

    right = kernel.fp8_gemm
    monkeypatch.setattr(kernel, "fp8_gemm", lambda *args: right(*args) * 1.01)
    results, printed, code = run(kernel_gpu, "dense", "--smoke", "--v3", str(tmp_path))
    assert code == 1 and "WRONG: " in printed and json.loads(printed.splitlines()[-1])["wrong"] == 2
    assert {row["contestant"] for row in results["rows"] if row.get("wrong")} == {"fp8_gemm"}


@pytest.mark.skipif(kernels.library() is None, reason="there is no C compiler")
def test_the_cpu_kernels_bench(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On sizes that take no time; a kernel that is wrong ends it."""
    monkeypatch.setattr(kernel_cpu, "BYTES", 1 << 20)
    monkeypatch.setattr(kernel_cpu, "SHAPES", [(64, 96)])
    monkeypatch.setattr(kernel_cpu, "FORM_SHAPE", (64, 256))
    monkeypatch.setattr(kernel_cpu, "EXPERTS", (64, 32, 8, 2))
    monkeypatch.setattr(kernel_cpu, "PROMPTS", [(40, 100)])
    results, printed, code = run(kernel_cpu, "--turns", "2")
    assert code == 0 and len(results["rows"]) == len(kernel_cpu.ROWS) + len(kernel_cpu.FORM_ROWS) + 7
    assert len(printed.splitlines()) == len(results["rows"]) + 1 and results["peak_gflops"] > 0
    for row in results["rows"]:
        ours = row.get("ours") or row["bfloat16"]
        assert ours["ratio"] == 1 and ours["us"] > 0
    right = kernel_cpu.kernel_cpu.linear
    monkeypatch.setattr(kernel_cpu.kernel_cpu, "linear", lambda *args: right(*args) * 1.02)
    with pytest.raises(AssertionError, match="ours is"):
        run(kernel_cpu, "--turns", "1")


@pytest.mark.trust
def test_memory_of_every_converter(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize.py as well, from FP8 and from plain weights; the table has a row for each."""
    sizes = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256,
             "num_attention_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 128}  # fmt: skip
    monkeypatch.setattr(convert_memory, "V3", convert_memory.V3 | sizes)
    rows, printed, code = run(convert_memory, "--ranks", "1", "2", "--layers", "2")
    assert code == 0 and json.loads(printed.splitlines()[-1])["within"]
    read = {row["what"]: row["bytes_read"] for row in rows}
    assert list(read) == ["convert for 1", "convert for 2", "quantize to int4 on the CPU", "cast to bf16 on the CPU",
                          "quantize to fp8 on the CPU"]  # fmt: skip
    assert read["quantize to fp8 on the CPU"] == rows[3]["bytes_written"] > 1.5 * read["cast to bf16 on the CPU"]
    table = tables.convert_memory({"results": rows}).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "`convert.py`, for 1 or 2 ranks", "`fp8_cast_bf16.py`, on the CPU",
        "`quantize.py --format int4`, on the CPU", "`quantize.py --format fp8`, on the CPU",
    ]  # fmt: skip


def test_figures_and_their_table() -> None:
    clock = NoClock()
    clock.copy, clock.peaks = 1e12, {"fp8": 2e15, "bf16": 1e15}
    found = race.figures([2e-6, 4e-6, 3e-6], Contestant("a", {}, torch.ones(1), 1e6, 6e9, "fp8"), clock)
    assert found["us"] == pytest.approx(3) and found["best_us"] == pytest.approx(2)
    assert found["tflops"] == pytest.approx(2000) and found["gb_per_s"] == pytest.approx(1e6 / 3e-6 / 1e9)
    assert found["limit_us"] == pytest.approx(3) and found["of_limit"] == pytest.approx(1)
    rows = [{"m": 1, "contestant": "a", **found}, {"m": 1, "contestant": "b", **found, "us": 6.0, "graph": False},
            {"m": 1, "contestant": "c", "refused": "so"}, {"m": 1, "contestant": "d", "wrong": True}]  # fmt: skip
    names = [*"abcde"]
    assert len(race.header(["m"], names)) == len(race.shown(rows, ["m"], names))
    assert race.shown(rows, ["m"], names) == [
        "1", "3.0", "2000", "333", "100", "6.0 eager", "2.00", "refused", "–", "WRONG", "–", "–", "–",
    ]  # fmt: skip


def test_a_peer_runs_its_own_modules(tmp_path: Path) -> None:
    """A stand-in for the V3 repository, whose modules have the names of ours."""
    (tmp_path / "kernel.py").write_text("from ops.reference import act_quant\n")
    (tmp_path / "model.py").write_text("import kernel\n")
    assert peers.find_v3(str(tmp_path / "nowhere"), torch.device("cpu")) is None
    peer = peers.find_v3(str(tmp_path), torch.device("cpu"))
    assert peer is not None
    try:
        assert peer.ask(do="build", what="silu", m=3, inter=128, sets=2)["error"] < kernel_gpu.QUANTISED
        assert peer.ask(do="ready", calls=2) == {"graph": False} and peer.ask(do="time") == {"seconds": 1.0}
        with pytest.raises(Refused, match="fp8_gemm"):
            peer.ask(do="build", what="dense", m=1, n=128, k=128, sets=1)
    finally:
        peer.close()


def test_a_peer_that_dies_or_hangs_is_refused(tmp_path: Path) -> None:
    peer = Peer(tmp_path, torch.device("cpu"), limit=0.5)
    for command, why in ((["false"], "ended"), (["sleep", "60"], "no answer in 0 s")):
        peer.command = command
        with pytest.raises(Refused, match=why):
            peer.ask(do="time")
        assert peer.process is None


SMALL = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=64, hidden_size=64,
    intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2,
    num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
    norm_topk_prob=True, routed_scaling_factor=1.0, scoring_func="sigmoid", topk_method="noaux_tc", q_lora_rank=32,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=512,
    num_nextn_predict_layers=0, rms_norm_eps=1e-6, rope_theta=10000,
)  # fmt: skip
TABLE = """\
main: n_kv_max = 256, n_batch = 2048
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|    96 |      4 |    2 |    200 |    0.500 |   384.00 |    0.250 |    32.00 |    0.750 |   266.67 |
"""


def test_the_forms_run_beside_their_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine on a small checkpoint; a peer is a program that prints what theirs do, the other is not there."""
    make_checkpoint(tmp_path / "small", SMALL)
    binary = tmp_path / "ik_llama.cpp" / "llama-batched-bench"
    binary.parent.mkdir()
    binary.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\ntouch llama.log\ncat >&2 <<'END'\n{TABLE}END\nsleep 0.2\n")
    binary.chmod(0o755)
    (tmp_path / "ik_llama.cpp-bf16.gguf").touch()
    monkeypatch.setattr(forms, "memory_read", lambda: 10.0)
    kept = []
    case = ForwardCase(2, 96, 4)
    found = forms.measure({"bf16": tmp_path / "small"}, tmp_path, 2, 1, [case], lambda r: kept.append(json.dumps(r)))
    assert len(kept) == 2 and json.loads(kept[-1]) == found
    printed = capsys.readouterr().out
    assert "llama.cpp bf16 is left out: there is no" in printed and printed.count("turn 2, ") == 2
    assert (tmp_path / "asked").read_text().count("-npp 96 -ntg 4 -npl 2 -c 512 -t 1") == 2
    assert not Path("llama.log").exists()  # what they leave in the working directory
    [group] = found["groups"]
    prefill, decode = group["rows"]
    assert (prefill["name"], decode["name"]) == ("prefill 2 x 96", "decode, 2 sequences")
    peer = "ik_llama.cpp bf16"
    assert prefill["tok_s"][peer]["best"] == 384 and decode["tok_s"][peer]["median"] == 32
    ours = decode["tok_s"]["bf16"]["best"]
    assert decode["ratio"]["bf16"].keys() == {peer} and max(decode["ratios"]["bf16"][peer]) == pytest.approx(ours / 32)
    sides = group["sides"]
    assert sides["bf16"]["peak_mib"] >= sides["bf16"]["anonymous_mib"] > 0
    assert 0 < sides["bf16"]["load_s"] < sides["bf16"]["start_s"] and sides[peer]["peak_mib"] > 0
    # 2 of 4 experts each: 3 of 4 together; latents of 98 tokens, 48 numbers of two bytes in two layers
    limit = decode["limit"]["bf16"]
    read = Engine(tmp_path / "small")
    try:
        read.start(256, 1)
        assert read.reads(ForwardCase(2, 0, 0)) + 2 * 98 * 48 * 2 * 2 == limit["step_bytes"]
    finally:
        read.child.close()
    assert limit["tok_s"] == pytest.approx(2 * 10e9 / limit["step_bytes"])
    assert limit["share"] == pytest.approx(ours / limit["tok_s"]) and "limit" not in prefill


def test_what_llama_batched_bench_prints() -> None:
    assert llama_side.parse(TABLE) == (0.5, 0.25)
    row = {"pp": 512, "tg": 32, "pl": 1, "t_pp": 1.5, "speed_pp": 341.3, "t_tg": 2.5, "t": 4.0}
    assert llama_side.parse("0.00.1 I load: {\n\n" + json.dumps(row) + "\n") == (1.5, 2.5)
    with pytest.raises(ValueError, match="no row in what it printed"):
        llama_side.parse("error: failed to load model")


def test_the_table_of_forms() -> None:
    """Two of ours beside one peer: its ratio to each."""
    decode = {
        "name": "decode at 512",
        "tok_s": {"fp8": {"best": 60.0}, "int8": {"best": 66.0}, "ik_llama.cpp Q8_0": {"best": 50.0}},
        "ratio": {"fp8": {"ik_llama.cpp Q8_0": 1.2}, "int8": {"ik_llama.cpp Q8_0": 1.3}},
        "limit": {form: {"step_bytes": 4e8, "tok_s": 75.0, "share": 0.8} for form in ("fp8", "int8")},
    }
    about = {"start_s": 2.0, "peak_mib": 2048}
    group = {"bits": 8, "read_gb_s": [20.0, 30.0], "rows": [decode], "sides": dict.fromkeys(decode["tok_s"], about)}
    record = {"results": {"groups": [group]}}
    assert tables.cpu_forms(record).splitlines()[2:] == [
        "| fp8 | this engine | 60.0 | 2.0 | 2.0 |", "| int8 | this engine | 66.0 | 2.0 | 2.0 |",
        "| Q8_0 | ik_llama.cpp | 50.0 (1.20 / 1.30) | 2.0 | 2.0 |",
    ]  # fmt: skip
    assert tables.cpu_limits(record).splitlines()[2:] == [
        "| fp8 | 30.0 | 0.40 | 75.0 | 80 % |", "| int8 | 30.0 | 0.40 | 75.0 | 80 % |"
    ]  # fmt: skip


def test_the_documents_hold_the_committed_figures(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    assert tables.main() == 0, capsys.readouterr().out
    assert sum(path.read_text().count("<!-- table: ") for path in tables.DOCUMENTS) > 8


def test_what_formats_and_the_page_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo held to a schema, and the tables: one without its file says how to get it."""
    found = format_masks.demo([2], turns=1)
    assert set(found) == {"2"} and min(found["2"].values()) > 0
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.made("page_time") == "Not measured yet: `python benchmarks/bench.py page-time` does."
    report.save(str(tmp_path / "format_masks.json"), {
        "schemas": {"any": {"compile_ms": 1.25, "mask_us": 16.1, "mask_us_mean": 20, "mask_us_p99": 300,
                            "step_ms": {"8": {"free": 0.5, "held": 0.75}}}},
        "demo": {"8": {"free": 1000.0, "held": 800.0}},
    })  # fmt: skip
    assert tables.made("format_masks").splitlines()[2] == "| any | 1.2 | 16 | 20 | 300 | 0.50 / 0.75 |"
    assert tables.made("format_demo").splitlines()[2] == "| 8 | 1000 | 800 | 0.80 |"
    rows = [{"kind": "a list", "at": [{"tokens": 100, "task": 1.0, "script": 0.25}, {"tokens": 4000, "task": 2, "script": 1}]}]
    report.save(str(tmp_path / "page_time.json"), {"rows": rows})
    assert tables.made("page_time").splitlines()[:3:2] == [
        "| an answer of | at 100 tokens, ms | at 4,000 tokens, ms |", "| a list | 1.00 (0.25) | 2.00 (1.00) |"
    ]  # fmt: skip


def test_a_table_that_differs_or_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    document = tmp_path / "README.md"
    monkeypatch.setattr(tables, "DOCUMENTS", [document])

    def main(text: str, *arguments: str) -> int:
        document.write_text(text)
        monkeypatch.setattr("sys.argv", ["tables.py", *arguments])
        return tables.main()

    right = f"before\n<!-- table: cpu -->\n{tables.made('cpu', tmp_path)}\n<!-- end -->\nafter\n"
    assert main(right, "--check") == 0
    wrong = right.replace("| decode", "| decoding", 1)
    assert wrong != right and main(wrong, "--check") == 1 and document.read_text() == wrong
    assert "README.md: cpu differs" in capsys.readouterr().out
    assert main(wrong) == 0 and document.read_text() == right
    for text, why in (
        (right.replace("<!-- end -->", ""), "no counterpart"),
        (right.replace("table: cpu", "table: gpu"), "no gpu.json"),
        (right + "<!-- fact: answers -->42<!-- end -->", "no function makes it"),
        (right.replace("table: cpu", "table: mutants"), "no function makes it"),
    ):
        assert main(text) == 2 and why in capsys.readouterr().err and document.read_text() == text


def test_no_table_is_made_of_a_smoke_run(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(kernel_gpu, "router", "--smoke", "--v3", str(tmp_path))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    record = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "kernel_router.json").write_text(json.dumps(record))
    with pytest.raises(tables.NoTable, match="smoke"):
        tables.made("kernel-router")
    del record["results"]["no_timing"]
    for row in record["results"]["rows"]:
        row.pop("no_timing", None)
    (tmp_path / "kernel_router.json").write_text(json.dumps(record))
    assert len(tables.made("kernel-router").splitlines()) == 2 + 2 + 2  # a line to each number of tokens, and the source


def test_every_benchmark_is_listed() -> None:
    listed = {Path(command[0]).name for command in (bench.COMMANDS | bench.ON_A_GPU).values()}
    others = {"bench.py", "tables.py", "tune_gemm.py", "revisions.py", "gpu_proof.py"}
    assert {path.name for path in bench.HERE.glob("*.py")} - others == listed - {"evaluate.py"}
    assert {f"kernel-{name}" for name in kernel_gpu.BENCHES} <= set(bench.ON_A_GPU)
    assert set(tables.KEYS) == set(kernel_gpu.BENCHES)


def test_the_server_bench_arrives_and_counts_as_it_says() -> None:
    dues = online_serving.arrivals(4000, rate=5.0, seed=1)
    assert dues == online_serving.arrivals(4000, rate=5.0, seed=1) == sorted(dues)
    gaps = [b - a for a, b in itertools.pairwise(dues)]
    mean = statistics.mean(gaps)
    assert mean == pytest.approx(0.2, rel=0.1) and statistics.stdev(gaps) == pytest.approx(mean, rel=0.1)  # exponential
    assert online_serving.arrivals(3, math.inf, seed=1) == [0.0] * 3
    assert online_serving.percentiles([float(i) for i in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert online_serving.percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert online_serving.percentiles([]) == {}

    Outcome = online_serving.Outcome
    outcomes = [
        Outcome(0.5, 2.0, [0.1, 0.1], 3, True), Outcome(1.5, 2.0, [0.1], 2, True), Outcome(0.5, 2.0, [0.3, 0.2], 3),
        Outcome(error="refused"),
    ]  # fmt: skip
    found = online_serving.summary(outcomes, 4.0, (1.0, 0.2))
    assert (found["answers"], found["right"], found["errors"], found["tokens"]) == (3, 2, ["refused"], 8)
    assert (found["tokens_per_second"], found["requests_per_second"]) == (2.0, 0.75)
    assert found["good_requests_per_second"] == 0.25
    assert found["first_token_s"]["p50"] == 0.5 and found["between_tokens_s"]["p99"] == 0.3


@pytest.mark.trust
def test_the_server_bench_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against server.py alone; and its picture is drawn."""
    path = tmp_path / "online_serving.json"
    flags = ["--rates", "20,inf", "--requests", "1", "--threads", "1", "--peer-python", "", "--output", str(path)]
    monkeypatch.setattr("sys.argv", ["online_serving.py", *flags])
    online_serving.main()
    record = json.loads(path.read_text())
    assert [row["rate"] for row in record["results"]["rows"]] == [20.0, "all at once"]
    for row in record["results"]["rows"]:
        side = row["server.py"]
        assert side["answers"] == side["right"] == 1 and side["errors"] == []
        assert 0 < side["first_token_s"]["p50"] < side["end_to_end_s"]["p99"]
        assert side["between_tokens_s"] and "throughput_ratio" not in row
    runpy.run_path(str(FIGURE))["draw"](record, tmp_path / "server.png")
    assert (tmp_path / "server.png").read_bytes().startswith(b"\x89PNG")


def test_lanes_send_what_is_counted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes a side, on the demo: tokens a second, and bytes of a step as plan.py's arithmetic has them."""
    monkeypatch.setattr(lane_throughput, "CONCURRENT", (4,))
    [row], _, code = run(lane_throughput, "--turns", "1", "--new", "3")
    assert code == 0 and row["concurrent"] == 4
    assert all(row[side]["tokens_s"] > 0 for side in lane_throughput.SIDES)
    for side in ("lanes", "tensor parallel"):
        assert row[side]["sent"] == row[side]["predicted"] > 0
    assert row["lanes"]["ratio"] > 0 and row["pipeline"]["ratio"] > 0


def test_copies_of_a_token_that_dispatch_sends() -> None:
    """As counted for the design: to other nodes, and within eight GPUs to all ranks but the token's own."""
    v3 = load_config(tables.ROOT / "configs" / scale_out.V3)
    others = {gpus: scale_out.copies(v3, gpus) for gpus in (8, 16, 32, 64)}
    assert [round(others[gpus][0], 1) for gpus in (8, 16, 32, 64)] == [0, 1.0, 2.3, 3.5]
    assert others[8][1] == pytest.approx(3.96 * 7 / 8, rel=0.02)
    assert all(nodes + spread > 3 and nodes <= 7 for nodes, spread in others.values())
    assert all(spread <= 8 for _, spread in others.values())


def test_many_gpus_are_counted_as_the_committed_table_has_them(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_out, "GPUS", (8, 32))
    results, _, code = run(scale_out)
    committed = {(row["gpu"], row["gpus"]): row for row in tables.read("scale_out")["results"]["rows"]}
    assert code == 0 and len(results["rows"]) == 4
    for row in results["rows"]:
        other = committed[row["gpu"], row["gpus"]]
        for key in ("decode_gather", "decode_dispatch", "prefill_gather", "prefill_dispatch"):
            if row[key] is None:
                assert other[key] is None
                continue
            assert row[key]["tokens_per_second_node"] == pytest.approx(other[key]["tokens_per_second_node"], rel=0.02)
            assert row[key]["weights"] == other[key]["weights"]
    by_gpus = {(row["gpu"], row["gpus"]): row for row in results["rows"]}
    assert by_gpus["H800", 8]["decode_gather"] is None  # 86.9 GB and more do not fit
    assert by_gpus["H200", 32]["decode_gather"]["exchange_ms"] > 5 * by_gpus["H200", 32]["decode_dispatch"]["exchange_ms"]


def test_two_overlapping_batches_as_committed(run: Any) -> None:
    results, _, code = run(scale_out, "--overlap")
    committed = tables.read("overlap")["results"]["rows"]
    assert code == 0 and [row["gain"] for row in results["rows"]] == pytest.approx([row["gain"] for row in committed])
    slow = [row for row in committed if row["kind"] == "decode" and row["gain"] > 1]
    assert [(row["system"], row["rows"]) for row in slow] == [("H800, 200 Gb/s", 64)]  # as the document says
    assert max(row["gain"] for row in committed) == pytest.approx(1.45, abs=0.005)
    for row in committed:
        assert row["node_first_exchange_ms"] <= row["exchange_ms"] * (1 + 1e-9)
