"""What plan.py prints and refuses: an estimate of what a run takes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plan
from checkpoint.convert import convert
from core.config import load_config
from core.numerics import Numerics
from core.run_config import RunConfig
from core.stages import divide
from engine import memory, rank_memory, stage_layouts
from engine.rank_memory import RankSpec
from ops.cpu import kernels
from support.checkpoints import fp8_sizes, make_checkpoint
from support.families import FAMILIES
from support.processes import environment

INFERENCE = Path(plan.__file__).parent
CONFIG = INFERENCE / "configs" / "config_671B.json"
TP8 = RankSpec(load_config(CONFIG), Numerics(torch.bfloat16, "fp8", experts="split"), 8, mtp=True)


def command(capsys, *flags: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
        status = plan.main()
    return status, *capsys.readouterr()


def test_json(capsys):
    status, out, err = command(
        capsys, "--config", CONFIG, "--tp", 8, "--max-model-len", 32768, "--max-num-seqs", 32, "--json"
    )
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["model"] == {"parameters": 671_026_419_200, "mtp_parameters": 11_610_068_224}
    assert found["run"] | {"numerics": ""} == {
        "ranks": 8, "dp": 1, "tp": 8, "pp": 1, "device": "cuda", "numerics": "", "experts": "split", "max_model_len": 32768, "max_num_seqs": 32,
        "max_num_batched_tokens": 2048, "mtp": 0, "kv_cache_dtype": "auto",
    }  # fmt: skip
    rank = found["rank"]
    assert set(rank["weights"]) == {*rank_memory.PARTS, rank_memory.MTP}
    assert sum(rank["weights"].values()) == sum(rank_memory.weight_bytes(TP8).values())
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


@pytest.mark.parametrize(
    "name, billions, mtp, ranks",
    [
        ("16B", 15.7, 0, 16), ("moonlight", 16.0, 0, 16), ("gigachat3_10B", 10.7, 0.4, 32), ("joyai_flash", 48.9, 0, 32),
        ("glm_4.7_flash", 29.9, 0.6, 4), ("kimi_k2", 1026.4, 0, 16), ("kimi_k2.6", 1026.4, 0, 64),
    ],
)  # fmt: skip
def test_every_config(capsys, name, billions, mtp, ranks):
    """As many parameters as are published, which no wrong size would give."""
    status, out, err = command(capsys, "--config", CONFIG.with_name(f"config_{name}.json"), "--tp", 4, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert [round(n / 1e9, 1) for n in found["model"].values()] == [billions, mtp]
    assert max(other["ranks"] for other in found["ranks"] if "problem" not in other) == ranks


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


def test_lanes(capsys):
    """Cache and sequences are those of all lanes; other numbers of ranks have as many lanes."""
    flags = "--config", CONFIG, "--tp", 2, "--dp", 4, "--max-model-len", 4096
    _, out, _ = command(capsys, *flags, "--json")
    found = json.loads(out)
    run, rank = found["run"], found["rank"]
    assert (run["ranks"], run["dp"], run["tp"]) == (8, 4, 2) and found["layouts"] is None
    lanes = replace(TP8, lanes=4)
    assert sum(rank["weights"].values()) == sum(rank_memory.weight_bytes(lanes).values())
    pages = memory.pages_that_fit(lanes, RunConfig(max_model_len=4096), 141 * 10**9 - sum(rank["weights"].values()))
    assert found["fits"]["141 GB"]["tokens"] == 4 * 64 * pages and found["fits"]["141 GB"]["sequences"] == 4 * (pages // 64)
    assert [other["ranks"] for other in found["ranks"] if "problem" not in other] == [4, 8, 16, 32, 64]
    text = command(capsys, *flags)[1]
    assert "8 ranks in 4 lanes of 2, experts split" in text and "all lanes together:" in text
    assert "not 12, 20, 24, 28, 36, 40, 44, 48, 52, 56, 60, 96: n_heads 128 does not divide by a lane's ranks" in text


def test_stages(capsys):
    """Weights, cache and what is sent of each stage are those of its rank; the memories are those of the stage that has
    the least room, shared by as many microbatches."""
    flags = "--config", CONFIG, "--tp", 8, "--pp", 2, "--max-model-len", 4096, "--mtp", 1, "--max-num-seqs", 7
    status, out, err = command(capsys, *flags, "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert [found["run"][key] for key in ("ranks", "dp", "tp", "pp")] == [16, 1, 8, 2]
    assert found["model"] == {"parameters": 671_026_419_200, "mtp_parameters": 11_610_068_224}
    run = RunConfig(pp=2, max_model_len=4096, mtp=1, max_num_seqs=7)
    ranks = stage_layouts.on_stages(TP8, divide(TP8.args, 2, mtp=True))
    pages = 2 * 4 * 65  # four sequences in each microbatch, each with room for a draft
    for stage, rank in zip(found["stages"], ranks, strict=True):
        assert stage["weights"] == sum(rank_memory.weight_bytes(rank).values())
        assert stage["latents"] == {"of_a_token": rank_memory.latent_bytes(rank), "bytes": pages * rank_memory.page_bytes(rank)}
        assert stage["total"] == memory.need(rank, run, pages * rank_memory.page_bytes(rank)).total
    assert [stage["layers"] for stage in found["stages"]] == [[0, 32], [33, 60]]
    assert sum(stage["cost"] for stage in found["stages"]) == pytest.approx(1)
    assert found["stages"][0]["sends"] == {"a_token": 14336, "decode_step": 8 * 14336, "largest_step": 2048 * 14336}
    assert found["stages"][1]["sends"]["largest_step"] == 0
    assert found["rank"]["total"] == max(stage["total"] for stage in found["stages"])
    fits = found["fits"]["96 GB"]
    least = min(memory.pages_that_fit(r, run, 96 * 10**9 - sum(rank_memory.weight_bytes(r).values())) for r in ranks)
    assert fits["tokens"] == least // 2 * 2 * 64 and fits["sequences"] == 2 * (least // 2 // 65)
    assert [other["ranks"] for other in found["ranks"] if "problem" not in other] == [2, 4, 8, 16, 32]
    reads = [rank_memory.decode_reads(r, 4, 4096, 1) for r in ranks]
    no_experts = sum(n for (_, part), n in rank_memory.weight_bytes(ranks[0]).items() if part not in (rank_memory.ROUTED, rank_memory.EMBEDDING))
    few = rank_memory.decode_reads(ranks[0], 0, 4096, 1)  # no tokens, no routed experts
    assert few.weights == no_experts, "the embedding is no head to a stage that has none"
    eight = found["decode"][1]
    most = max(reads, key=lambda r: r.weights + r.latents)
    assert (eight["weights"], eight["latents"]) == (most.weights, most.latents)
    assert eight["seconds"]["4.8"] == pytest.approx(2 * (most.weights + most.latents) / 4.8e12)
    text = command(capsys, *flags)[1]
    assert "16 ranks in 2 pipeline stages of 8, experts split" in text and "all microbatches together:" in text
    assert "\n    0  0-32              50.5%        44.23" in text and "gives the next stage 14,336 bytes a token" in text
    assert "not 64, 128: ffn.w1 has 18432 rows, which a stage's ranks cannot share" in text
    assert max(map(len, text.splitlines())) <= 120
    asked = json.loads(command(capsys, *flags, "--pp-layers", "20,41", "--json")[1])["stages"]
    assert [stage["layers"] for stage in asked] == [[0, 19], [20, 60]]


def test_a_pipeline_among_layouts(capsys):
    """It comes after the layouts in lanes, of as many ranks, and wins where the network is slow."""
    flags = "--config", CONFIG, "--world-size", 16, "--pp", 2, "--network", 1, "--concurrency", 200
    found = json.loads(command(capsys, *flags, "--json")[1])["layouts"]
    assert [(row["pp"], row["dp"], row["tp"], row["experts"]) for row in found["rows"][-3:]] == [
        (1, 16, 1, "whole"), (2, 1, 8, "split"), (2, 1, 8, "whole")
    ]  # fmt: skip
    assert (found["ranks"], found["recommended"]["pp"]) == (16, 2)
    assert "for 200 sequences at a time: --pp 2 --tp 8, experts split\n" in (text := command(capsys, *flags)[1])
    assert "\npp 2   8  split " in text
    fast = json.loads(command(capsys, *flags[:-3], 400, *flags[-2:], "--json")[1])["layouts"]
    assert fast["recommended"]["pp"] == 1


def test_layouts(capsys):
    flags = "--config", CONFIG, "--world-size", 16, "--memory", 80, "--bandwidth", 3.35, "--nvlink", 200, "--concurrency"
    _, out, err = command(capsys, *flags, 500, "--context", 4000, "--json")
    found = json.loads(out)["layouts"]
    assert err == "" and found["links"] == {"nvlink": 200e9, "network": 50e9, "ranks_per_node": 8}
    assert (found["memory"], found["bandwidth"], found["flops"]) == (80e9, 3.35e12, {"fp8": 1979e12, "bf16": 989e12})
    assert [(row["dp"], row["tp"], row["experts"]) for row in found["rows"]] == [
        (n, 16 // n, experts) for n in (1, 2, 4, 8, 16) for experts in ("split", "whole")
    ]
    assert found["problems"] == [] and found["context"] == 4000
    fastest = max(found["rows"], key=lambda row: row["decode"]["tokens_per_second"])
    best = found["recommended"]
    assert (best["dp"], best["tp"], best["experts"]) == (fastest["dp"], fastest["tp"], "split")
    one = found["rows"][0]["decode"]
    assert one["seconds"] == pytest.approx(one["linear"] + one["attention"] + one["exchange"])
    assert one["tokens_per_second"] == pytest.approx(one["sequences"] / one["seconds"])
    text = command(capsys, *flags, 500)[1].splitlines()
    assert max(map(len, text)) <= 120
    assert text[-2] == f"for 500 sequences at a time: --dp {best['dp']} --tp {best['tp']}, experts split"
    assert text[-1].startswith("  at most ") and "those of --dp 1, whose memory holds" in text[-1]
    text = command(capsys, *flags, 1)[1].splitlines()
    assert text[-2].endswith("--dp 1 --tp 16, experts split") and "a rank reads 3.8 GB a step, not 4.6" in text[-1]
    status, out, _ = command(capsys, "--config", CONFIG, "--world-size", 8, "--memory", 80, "--concurrency", 4)
    assert status == 0 and out.count("no room for a sequence") == 8
    assert out.endswith("no layout holds a sequence of 4,096 tokens: more ranks, or more memory\n")


def test_the_document_shows_a_table_of_layouts(capsys, monkeypatch):
    text = (INFERENCE.parent / "docs" / "performance.md").read_text()
    [shown] = re.findall(r"^python plan\.py (.*)$", text, re.MULTILINE)
    monkeypatch.chdir(INFERENCE)
    out = command(capsys, *shown.split())[1]
    assert f"```\n{out[out.index('layouts of') :]}```" in text


def test_layouts_where_not_every_number_of_lanes_divides(capsys):
    """16 heads are too few for 32 ranks of one lane. What is said of one rank is of the first layout that works."""
    flags = "--config", CONFIG.with_name("config_16B.json"), "--world-size", 32
    _, out, _ = command(capsys, *flags)
    assert "32 ranks in 2 lanes of 16" in out and "not --dp 1: n_heads 16 does not divide by 32 ranks" in out
    asked = [row["dp"] for row in json.loads(command(capsys, *flags, "--dp", 8, "--json")[1])["layouts"]["rows"]]
    assert asked == [2, 2, 4, 4, 8, 8, 16, 16, 32, 32]


def test_a_config_that_engines_read_differently_is_worth_one_line(capsys, tmp_path):
    rope = {**FAMILIES["v3"]["rope_scaling"], "mscale": None}
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["v3"] | {"rope_scaling": rope}))
    status, _, err = command(capsys, "--config", tmp_path / "config.json")
    assert status == 0 and err.count("\n") == 1
    assert err.startswith(f"warning: {tmp_path}/config.json: config: rope_scaling.mscale is missing and counts as 1")


def test_files_for_other_ranks(capsys, tmp_path):
    """A plan takes the converted files that a run takes, and refuses the others in its words."""
    make_checkpoint(tmp_path / "c", FAMILIES["v3"] | fp8_sizes(4) | {"n_shared_experts": 4})
    convert(tmp_path / "c", tmp_path / "two", 2)
    flags = ("--ckpt-path", tmp_path / "two", "--device", "cpu", "--tp")
    assert command(capsys, *flags, 2, "--dp", 2)[0] == command(capsys, *flags, 4)[0] == 0
    convert(tmp_path / "c", tmp_path / "stages", 1, n_stages=2, layers="1,2")
    _, out, _ = command(capsys, "--ckpt-path", tmp_path / "stages", "--device", "cpu", "--pp", 2, "--json")
    assert [stage["layers"] for stage in json.loads(out)["stages"]] == [[0, 0], [1, 2]]
    status, _, err = command(capsys, *flags, 1, "--pp", 2)
    says = f"{tmp_path / 'two'}: converted for 2 ranks, not 1 in each of 2 stages: --pp 2 takes 4, or convert for 1"
    assert (status, err) == (2, f"error: {says}\n")
    status, _, err = command(capsys, *flags, 1, "--dp", 2)
    says = f"{tmp_path / 'two'}: converted for 2 ranks, not 2 in 2 lanes; convert for 1, or give the original files"
    assert (status, err) == (2, f"error: {says}\n")


def test_a_checkpoint_on_a_cpu(capsys, tmp_path):
    make_checkpoint(tmp_path, FAMILIES["v3"] | fp8_sizes(2), fp8=True)
    status, out, err = command(capsys, "--ckpt-path", tmp_path, "--tp", 2, "--device", "cpu", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found["fits"]) == ["free here"]
    assert found["rank"]["graphs"] == 0 < found["rank"]["packing"]
    num = Numerics(gemm="bf16" if kernels.serve(torch.bfloat16) else None)  # where C multiplies FP8
    rank = RankSpec(load_config(tmp_path / "config.json"), num, 2, gpu=False, mtp=True)
    assert sum(found["rank"]["weights"].values()) == sum(rank_memory.weight_bytes(rank).values())
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
        (("--config", CONFIG, "--world-size", 4, "--dp", 3), "--dp 3 does not divide 4 ranks"),
        (("--config", CONFIG, "--world-size", 8, "--dp", 2, "--tp", 2), "--dp 2 times --tp 2 are 4 ranks, --world-size says 8"),
        (("--config", CONFIG, "--world-size", 3), "n_heads 128 does not divide by 3 ranks"),
        (("--config", CONFIG, "--dp", 2, "--tp", 3), "n_heads 128 does not divide by a lane's 3 ranks (it works with 2, 4, 8, 16 in"),
        (("--config", CONFIG, "--world-size", 8, "--device", "cpu"), "layouts on cpu need --memory, --bandwidth and --tflops"),
        (("--config", CONFIG, "--pp", 62), "--pp 62: the model has 61 layers, fewer than stages"),
        (("--config", CONFIG, "--pp", 2, "--pp-layers", "30,30"), "--pp-layers 30,30: these are 2 numbers, 60 together; expected 2"),
        (("--config", CONFIG, "--pp-layers", "61"), "--pp-layers needs --pp"),
        (("--config", CONFIG, "--pp", 2, "--dp", 2), "--dp 2 and --pp 2: lanes of stages are not implemented; leave one out"),
        (("--config", CONFIG, "--world-size", 9, "--pp", 2), "--pp 2 does not divide 9 ranks"),
        (("--config", CONFIG, "--world-size", 8, "--pp", 2, "--tp", 2), "--pp 2 times --tp 2 are 4 ranks, --world-size says 8"),
        (("--config", CONFIG, "--nvlink", 0), "argument --nvlink: 0 is not a positive number"),
        (("--config", CONFIG, "--tp", 16, "--max-model-len", 200000), "expected from 2 to this model's 163840"),
        (("--config", CONFIG, "--mtp", 5), "--mtp is 5, expected from 0 to 4"),
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


def test_a_cpu_gets_no_limits_at_a_gpus_bandwidths(capsys):
    flags = "--config", INFERENCE / "configs" / "config_16B.json", "--device", "cpu"
    status, out, err = command(capsys, *flags)
    assert (status, err) == (0, "") and "a decode step reads, 4,096 tokens" in out and "TB/s " not in out
    assert "ms at 0.02 TB/s" in command(capsys, *flags, "--bandwidth", 0.02)[1]
