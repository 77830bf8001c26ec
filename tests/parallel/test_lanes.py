"""Data-parallel lanes and virtual ranks: the same numbers, and in the deterministic mode the same bits, as one rank."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.convert import convert
from checkpoint.directory import Checkpoint, choose_args
from checkpoint.partition import Partition
from core.batch import Batch
from core.config import ModelArgs, load_config
from core.errors import UserError
from core.numerics import Numerics
from core.run_config import PAGE_SIZE, RunConfig
from engine.choose_numerics import choose_numerics, choose_virtual_ranks
from engine.layouts import Layout, layouts, messages
from engine.rank_memory import RankSpec
from engine.setup import _choose
from model import Transformer
from ops.cpu import kernels
from parallel.failure import RankProcess
from parallel.group import SOLO, Group, tree_sum
from support.checkpoints import fp8_sizes
from support.families import FAMILIES, V3
from support.model_pairs import hidden_states, ours, random_checkpoint, relative_error, tokens
from support.packed_checkpoints import LAYOUTS as PACKED
from support.packed_checkpoints import make_packed
from support.rank_weights import write_upstream
from support.thread_ranks import on_every_lane

IN_FP8 = V3 | fp8_sizes(4) | {
    "moe_intermediate_size": 512, "n_shared_experts": 1, "num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 3,
}  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "configs"
LAYOUTS = [(2, 1), (4, 1), (2, 2), (1, 4)]
LENGTHS = [70, 9, 1, 33]  # of the prompts, one a lane


def in_lockstep(model: Transformer, dp: Group, prompts: list[list[int]]) -> torch.Tensor:
    """The logits of this lane's prompt, while each lane runs its own, first all but two tokens and then one by one.
    A lane without a prompt runs padding, of which the others see nothing."""
    mine = prompts[dp.rank]
    n_pages = -(-max(map(len, prompts)) // PAGE_SIZE)
    cache, out = model.new_cache(n_pages + 1), []
    for start, stop in ((0, -2), (-2, -1), (-1, None)):
        rows = tuple(len(p[start:stop]) for p in prompts)
        if not any(rows):
            continue
        new = mine[start:stop]
        at = len(mine[:start]) if start else 0
        slices = [(new, at, list(range(n_pages)))] if new else [([0], 0, [n_pages])]
        hidden = model(Batch.pack(slices, model.device, rows if dp.size > 1 else ()), cache)
        out.append(model.logits(hidden[: len(new)]))
    return torch.cat(out)


@pytest.mark.parametrize("experts", ["whole", "split"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lanes, size", LAYOUTS)
def test_lanes_are_the_whole(tmp_path: Path, name: str, lanes: int, size: int, experts: Any) -> None:
    """Each lane's logits in float32, of a prompt of its own length, one of them idle, are those of one rank."""
    path = random_checkpoint(tmp_path / "c", FAMILIES[name])
    whole = ours(path)
    prompts = [tokens(n, whole.args.vocab_size, seed) for seed, n in enumerate(LENGTHS[:lanes])]
    prompts[-1] = [] if lanes > 2 else prompts[-1]
    expected = [whole.logits(hidden_states(whole, p)) if p else None for p in prompts]

    def work(tp: Group, dp: Group, world: Group) -> torch.Tensor:
        return in_lockstep(ours(path, Numerics(torch.float32, experts=experts), tp, dp=dp), dp, prompts)

    for rank, logits in enumerate(on_every_lane(lanes, size, work)):
        if (wanted := expected[rank // size]) is not None:
            assert relative_error(logits, wanted) < 1e-5


@pytest.mark.parametrize("lanes, size", [(2, 2), (4, 1)])
def test_mlps_within_a_lane(tmp_path: Path, lanes: int, size: int) -> None:
    """Widths that four ranks cannot share: a lane's ranks share the dense MLPs and shared experts, on its own tokens,
    and all ranks the routed experts. What is sent is what is counted."""
    uneven = V3 | {"intermediate_size": 258, "moe_intermediate_size": 126, "n_shared_experts": 1}
    path = random_checkpoint(tmp_path / "c", uneven)
    args = ModelArgs.from_hf(uneven)
    partition = Partition.choose(args, 4, lanes=lanes)
    assert partition.mlps_in_lane and partition.experts == "whole" and "within each lane" in partition.reason
    num = Numerics(torch.float32, experts="whole", mlps_in_lane=True)
    whole = ours(path)
    prompts = [tokens(n, V3["vocab_size"], seed) for seed, n in enumerate(LENGTHS[:lanes])]
    expected = [whole.logits(hidden_states(whole, p)) for p in prompts]

    def work(tp: Group, dp: Group, world: Group) -> Any:
        model = ours(path, num, tp, dp=dp)
        logits = in_lockstep(model, dp, prompts)
        dp.ranks.calls[dp.rank].clear()  # type: ignore[attr-defined]
        batch = Batch.pack([(list(range(5)), 0, [0])], "cpu", (5,) * lanes)
        model(batch, model.new_cache(1))
        return logits, dp.ranks.calls[dp.rank]  # type: ignore[attr-defined]

    rank = RankSpec(args, num, 4, gpu=False, mtp=True, lanes=lanes)
    [layout] = [found for found in layouts(rank, 4, "whole") if isinstance(found, Layout) and found.rank.lanes == lanes]
    counted = [(m.collective, m.nbytes) for m in messages(layout, 5, 0) if m.group == "dp"]
    for number, (logits, sent) in enumerate(on_every_lane(lanes, size, work)):
        assert relative_error(logits, expected[number // size]) < 1e-5
        assert sent == counted and len(sent) == 2 * args.n_moe_layers


def test_v3_over_many_gpus() -> None:
    """FP8 blocks of its MLPs do not divide over more than 16 ranks; in lanes they need not."""
    v3 = load_config(CONFIGS / "config_671B.json")
    assert not Partition.choose(v3, 16, quantised=True, lanes=16).mlps_in_lane
    for ranks, lanes in ((32, 32), (128, 128), (32, 4), (256, 64)):
        partition = Partition.choose(v3, ranks, quantised=True, lanes=lanes)
        assert (partition.mlps_in_lane, partition.experts) == (True, "whole")
    with pytest.raises(UserError, match="cannot share in whole 128-wide FP8 blocks"):
        Partition.choose(v3, 32, quantised=True)


@pytest.mark.parametrize("gemm", [None, "bf16"])
@pytest.mark.parametrize("experts", ["whole", "split"])
def test_files_that_were_converted_for_fewer_ranks(tmp_path: Path, experts: Any, gemm: Any) -> None:
    """Lanes and ranks cut what they need out of files for one rank, or for two where a lane has two or four."""
    path = random_checkpoint(tmp_path / "c", IN_FP8, fp8=gemm is not None)
    expected = ours(path, Numerics(torch.float32, gemm))
    prompts = [tokens(n, V3["vocab_size"], seed) for seed, n in enumerate(LENGTHS)]
    logits = [expected.logits(hidden_states(expected, p)) for p in prompts]
    for made_for, fitting in ((1, LAYOUTS), (2, [(2, 2), (1, 4)])):
        convert(path, tmp_path / f"{made_for}", made_for, experts=experts)
        for lanes, size in fitting:

            def work(tp: Group, dp: Group, world: Group, folder: Path = tmp_path / f"{made_for}") -> torch.Tensor:
                model = ours(folder, Numerics(torch.float32, gemm, experts=experts), tp, dp=dp)
                return in_lockstep(model, dp, prompts[: dp.size])

            for rank, found in enumerate(on_every_lane(lanes, size, work)):
                assert relative_error(found, logits[rank // size]) < 1e-5


SMALL = V3 | {"num_hidden_layers": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3,
              **(WIDE := {"moe_intermediate_size": 512, "n_shared_experts": 1})}  # fmt: skip
FEW = ("int4-groups-of-32", "int4-zero-points", "int8-blocks")
KINDS = [*FEW, *(pytest.param(name, marks=pytest.mark.trust) for name in PACKED if name not in FEW),
         "tied", "dense", "upstream of 1", "upstream of 2"]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A checkpoint of that kind."""
    name, folder = request.param, tmp_path_factory.mktemp("kind") / "c"
    made_for = re.fullmatch(r"upstream of (\d)", name)
    if name in PACKED:
        make_packed(folder, PACKED[name], SMALL | fp8_sizes(4) | {"hidden_size": 256, **WIDE})
    elif made_for:
        config = SMALL | {"num_nextn_predict_layers": 0}
        random_checkpoint(folder.with_name("source"), config)
        write_upstream(folder.with_name("source"), folder, int(made_for[1]), config)
        shutil.copy(folder.with_name("source") / "config.json", folder)
    else:
        changes = {"tied": {"tie_word_embeddings": True, "num_nextn_predict_layers": 0},
                   "dense": {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}}  # fmt: skip
        random_checkpoint(folder, SMALL | changes[name])
    return name, folder


@pytest.mark.parametrize("experts, dtype", [
    ("whole", "float32"), ("split", "bfloat16"), pytest.param("split", "float32", marks=pytest.mark.trust),
    pytest.param("whole", "bfloat16", marks=pytest.mark.trust),
])  # fmt: skip
def test_lanes_of_every_kind_of_checkpoint(kind: tuple[str, Path], experts: Any, dtype: str) -> None:
    """One rank's logits on two lanes of two ranks: of weights as they are stored to the bit, in the deterministic mode,
    and of dequantised ones in float32."""
    name, folder = kind
    checkpoint = Checkpoint(folder)
    args = choose_args(checkpoint, None)
    num, _ = choose_numerics(args, torch.device("cpu"), dtype, "auto", specs=checkpoint.expected(args))
    prompts = [tokens(n, args.vocab_size, seed) for seed, n in enumerate((70, 9))]
    if name == "upstream of 2":
        if experts == "split":
            pytest.skip("these are whole")
        whole = folder.with_name("source")
    else:
        whole = folder
    for virtual_ranks in (1, 4) if dtype == "float32" else (4,):
        num = replace(num, experts=experts, batch_invariant=virtual_ranks > 1, virtual_ranks=virtual_ranks)
        alone = ours(whole, num)
        expected = [in_lockstep(alone, SOLO, [prompt]) for prompt in prompts]
        work = partial(lambda num, tp, dp, world: in_lockstep(ours(folder, num, tp, dp=dp), dp, prompts), num)
        for rank, logits in enumerate(on_every_lane(2, 2, work, ordered=virtual_ranks > 1)):
            assert relative_error(logits, expected[rank // 2]) < (1e-5 if virtual_ranks == 1 else 1e-30)


VIRTUAL = [(1, 1), (1, 2), (2, 1), (1, 4), (4, 1), (2, 2)]
def deterministic(dtype: torch.dtype, gemm: Any, virtual_ranks: int = 4) -> Numerics:
    return Numerics(dtype, gemm, experts="split", batch_invariant=True, virtual_ranks=virtual_ranks)


@pytest.mark.parametrize("dtype, gemm", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "bf16"),
                                         (torch.bfloat16, "fp8")])  # fmt: skip
def test_the_same_bits_on_any_number_of_ranks(tmp_path: Path, dtype: torch.dtype, gemm: Any) -> None:
    """One rank, two and four, as a tensor-parallel group, as lanes and mixed: bitwise the same logits."""
    path = random_checkpoint(tmp_path / "c", IN_FP8, fp8=gemm is not None)
    prompts = [tokens(n, V3["vocab_size"], seed) for seed, n in enumerate(LENGTHS)]
    found: dict[int, set[bytes]] = {}
    for lanes, size in VIRTUAL:

        def work(tp: Group, dp: Group, world: Group) -> list[tuple[int, torch.Tensor]]:
            model = ours(path, deterministic(dtype, gemm), tp, dp=dp)
            first = dp.rank * len(prompts) // dp.size
            turns = range(len(prompts) // dp.size)
            return [(first + i, in_lockstep(model, dp, [prompts[lane * len(turns) + i] for lane in range(dp.size)]))
                    for i in turns]  # fmt: skip

        for answers in on_every_lane(lanes, size, work, ordered=True):
            for number, logits in answers:
                found.setdefault(number, set()).add(logits.numpy().tobytes())
    assert [len(bits) for bits in found.values()] == [1] * len(prompts)


@pytest.mark.parametrize("experts, compiled", [
    ("whole", True), ("split", False), *(pytest.param(*one, marks=pytest.mark.trust) for one in (("split", True), ("whole", False))),
])  # fmt: skip
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_bits_in_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, experts: Any, compiled: bool
) -> None:
    """Two lanes of two ranks (V3: and of one) and one rank, with the latents in FP8; with our C, and where nothing
    compiles it."""
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda: None)
    path = random_checkpoint(tmp_path / "c", FAMILIES[name])
    num = replace(deterministic(torch.bfloat16, None), experts=experts, fp8_latents=True)
    vocabulary = FAMILIES[name].get("text_config", FAMILIES[name])["vocab_size"]
    prompts = [tokens(n, vocabulary, seed) for seed, n in enumerate((70, 9))]
    alone = ours(path, num)
    expected = [in_lockstep(alone, SOLO, [prompt]) for prompt in prompts]
    work = partial(lambda tp, dp, world: in_lockstep(ours(path, num, tp, dp=dp), dp, prompts))
    for size in (2, 1) if name == "v3" else (2,):
        for rank, logits in enumerate(on_every_lane(2, size, work, ordered=True)):
            assert torch.equal(logits, expected[rank // size])


def test_without_virtual_ranks_the_bits_differ(tmp_path: Path) -> None:
    """The control: in batch-invariant mode alone, one rank and four round their sums differently."""
    path = random_checkpoint(tmp_path / "c", V3)
    prompt = tokens(70, V3["vocab_size"])
    num = deterministic(torch.bfloat16, None, virtual_ranks=1)

    def work(tp: Group, dp: Group, world: Group) -> torch.Tensor:
        return in_lockstep(ours(path, num, tp, dp=dp), dp, [prompt])

    bits = {work(SOLO, SOLO, SOLO).numpy().tobytes(), *(x.numpy().tobytes() for x in on_every_lane(1, 4, work, True))}
    assert len(bits) == 2


def test_the_head_is_cut_as_for_virtual_ranks(tmp_path: Path) -> None:
    """Its product has one shape, whoever computes it: a quarter of the vocabulary."""
    path = random_checkpoint(tmp_path / "c", V3)
    for size, n in ((1, 4), (2, 2), (4, 1)):
        work = partial(lambda tp, dp, world: ours(path, deterministic(torch.float32, None), tp).head_shards)
        for shares in on_every_lane(1, size, work):
            assert [tuple(share.shape) for share in shares] == [(V3["vocab_size"] // 4, V3["hidden_size"])] * n


OVER_GLOO = """
import sys, torch, torch.distributed as dist
from parallel.group import Group
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3)
for through_host in (False, True):
    group = Group(rank, 3, dist.group.WORLD, dist.group.WORLD, through_host=through_host)
    for counts in ([2, 0, 5], [1, 1, 1], [0, 0, 4], [0, 1, 0]):
        def rows(r):
            n = max(counts[r], 1)  # a lane without tokens has a row of padding
            x = torch.randn(n, 7, generator=torch.Generator().manual_seed(r)).bfloat16()
            return x, torch.arange(n * 3).view(n, 3) + 100 * r, x.to(torch.float8_e4m3fn), x[:, :1].float()
        wanted = [torch.cat([part[: counts[r]] for r, part in enumerate(parts)]) for parts in zip(*map(rows, range(3)))]
        found = group.gather(counts, *rows(rank))
        assert all(a.dtype == b.dtype and torch.equal(a.float(), b.float()) for a, b in zip(found, wanted, strict=True))
        parts = [torch.randn(sum(counts), 5, generator=torch.Generator().manual_seed(9 + r)) for r in range(3)]
        own = group.scatter_sum(parts[rank].clone(), counts, max(counts[rank], 1))
        total = ((parts[0] + parts[1]) + parts[2]).split(counts)[rank]
        assert torch.equal(own[: counts[rank]], total) and not own[counts[rank] :].any() and len(own) == max(counts[rank], 1)
    assert group.gather_bytes(b"ab" * rank) == [b"", b"ab", b"abab"] and group.gather_bytes(b"") == [b""] * 3
    print("right", flush=True)
dist.destroy_process_group()
"""


def test_rows_change_lanes_over_gloo(tmp_path: Path) -> None:
    """Three processes: every lane's rows, of several dtypes in one message, and the sums back to each; some have none."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "inference"), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", OVER_GLOO]
    ranks = [subprocess.Popen([*run, str(r), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True, env=env)
             for r in range(3)]  # fmt: skip
    assert [p.communicate(timeout=120)[0].split() for p in ranks] == [["right"] * 2] * 3


def test_no_rank_of_a_lane_is_blamed() -> None:
    """For NaN, which may be another lane's: its experts' part of the sum comes with the rank's own."""
    lane = Group(0, 2, members=(2, 3), process=RankProcess(2, 4))
    lane._record_partial_sum(torch.tensor([torch.nan]))
    assert lane.nonfinite_ranks() == [] and not lane.partial_sums


@pytest.mark.parametrize("n", range(1, 18))
def test_a_sum_over_ranks_is_one_tree(n: int) -> None:
    """Parts in runs of a power of two may be added first: the bits of the whole are the same."""
    parts = torch.randn(n, 1000, generator=torch.Generator().manual_seed(n))
    whole = tree_sum(parts)
    for run in (1, 2, 4, 8, 16):
        assert torch.equal(tree_sum([tree_sum(some) for some in parts.split(run)]), whole)
    assert torch.allclose(whole, parts.double().sum(0).float(), atol=1e-4)


def test_experts_of_converted_files(tmp_path: Path) -> None:
    """Files of one rank serve both layouts of the experts. Files of two keep theirs, on more ranks and deterministic
    too, whose layout is the same on any number of ranks."""
    path = random_checkpoint(tmp_path / "c", V3)
    for made_for, layout in ((1, "whole"), (1, "split"), (2, "whole"), (2, "split")):
        folder = tmp_path / f"{made_for}-{layout}"
        convert(path, folder, made_for, experts=layout)  # type: ignore[arg-type]
        for ranks, lanes in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2)):
            if ranks // lanes % made_for:
                continue
            run = RunConfig(dp=lanes, n_pages=4, dtype="float32")
            plain, alike = (
                _choose(folder, replace(run, deterministic=same), None, torch.device("cpu"), Group(0, ranks), False).num
                for same in (False, True)
            )
            assert plain.experts == (layout if made_for > 1 else "split" if ranks > 1 else "whole")
            assert (alike.experts, alike.virtual_ranks) == (layout if made_for > 1 else "split", 4)
            if made_for == 1:
                run = replace(run, experts="whole", deterministic=True)
                assert _choose(folder, run, None, torch.device("cpu"), Group(0, ranks), False).num.experts == "whole"


def test_a_deterministic_run_says_how_experts_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ranks could split them, four virtual ones cannot."""
    path = random_checkpoint(tmp_path / "c", V3 | {"moe_intermediate_size": 126, "n_shared_experts": 4})
    for same, says in ((False, "split, a rank has 63"), (True, "whole, as --deterministic divides them")):
        run = RunConfig(n_pages=4, dtype="float32", deterministic=same)
        found = _choose(path, run, None, torch.device("cpu"), Group(0, 2), True).num.experts
        assert f"experts: {says}" in capsys.readouterr().err and says.startswith(found)


def test_virtual_ranks_of_a_run() -> None:
    """As many as the model divides over, with split experts if these allow as many; the ranks must share them."""
    v3, tiny = load_config(CONFIGS / "config_671B.json"), ModelArgs.from_hf(V3)
    both = ("split", "whole")
    assert choose_virtual_ranks(Partition(v3, 8, "split", True), both) == {"virtual_ranks": 16, "experts": "split"}
    assert choose_virtual_ranks(Partition(v3, 8, "whole", True), ("whole",)) == {"virtual_ranks": 16, "experts": "whole"}
    assert choose_virtual_ranks(Partition(tiny), both) == {"virtual_ranks": 4, "experts": "split"}
    narrow = ModelArgs.from_hf(V3 | {"moe_intermediate_size": 126, "n_shared_experts": 4})
    assert choose_virtual_ranks(Partition(narrow), both) == {"virtual_ranks": 4, "experts": "whole"}
    odd = ModelArgs.from_hf(V3 | {"num_attention_heads": 3, "vocab_size": 255, "n_group": 1, "topk_group": 1})
    assert choose_virtual_ranks(Partition(odd), both) == {"virtual_ranks": 1, "experts": "whole"}
    with pytest.raises(UserError, match=r"^--deterministic sums in 1 part, which 3 ranks cannot share: start 1$"):
        choose_virtual_ranks(Partition(replace(odd, n_routed_experts=33, inter_dim=384, moe_inter_dim=129), 3), both)
    with pytest.raises(UserError, match=r"^--deterministic sums in 16 parts, which 32 ranks cannot share: start 1 or 2 or"):
        choose_virtual_ranks(Partition(v3, 32, "whole"), both)


@pytest.mark.parametrize("gemm", [None, "bf16", "fp8"])
@pytest.mark.parametrize("lanes, size", LAYOUTS)
def test_what_is_sent_is_what_is_counted(tmp_path: Path, lanes: int, size: int, gemm: Any) -> None:
    """The collectives of a step, one by one with their bytes, are those that plan.py counts; the MTP module's too."""
    path = random_checkpoint(tmp_path / "c", IN_FP8, fp8=gemm is not None)
    num = Numerics(torch.bfloat16, gemm, experts="split")
    rows = 5

    def work(tp: Group, dp: Group, world: Group) -> list[list[tuple[str, int]]]:
        model = ours(path, num, tp, dp=dp)
        batch = Batch.pack([(list(range(rows)), 0, [0])], "cpu", (rows,) * lanes if lanes > 1 else ())
        cache = model.new_cache(1)
        hidden = model(batch, cache)
        model.logits(hidden[-2:])
        model.logits(model.draft(batch, hidden, cache)[-2:])
        return [group.ranks.calls[group.rank] if group.size > 1 else [] for group in (tp, dp)]  # type: ignore[attr-defined]

    for of_tp, of_dp in on_every_lane(lanes, size, work):
        rank = RankSpec(ModelArgs.from_hf(IN_FP8), num, lanes * size, gpu=False, mtp=True, lanes=lanes)
        [layout] = [found for found in layouts(rank, lanes * size, "split") if isinstance(found, Layout)
                    and found.rank.lanes == lanes]  # fmt: skip
        expected = [*messages(layout, rows, 2), *messages(layout, rows, 2, mtp=True)]
        assert of_tp == [(m.collective, m.nbytes) for m in expected if m.group == "tp"]
        assert of_dp == [(m.collective, m.nbytes) for m in expected if m.group == "dp"]
